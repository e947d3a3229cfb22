"""Pairs a model with the module that holds its averages: by name, watched for changes, swapped.

:mod:`.naming` knows the names (wrappers), :mod:`.module_pairs` finds the pairs (tied weights,
buffers), :mod:`.planned_pairs` updates them, :mod:`.pairing` keeps them and pairs anew when tensors
are replaced (:mod:`.watch`), :mod:`.paired_module` is the module that owns a pairing.
:mod:`.exchanging` puts averages into the model, :mod:`.swapping` for the duration of a block,
:mod:`.stepping` tells of optimizers. :mod:`.copying` makes the averaged copy (:mod:`.deep_copies`,
or a :mod:`.skeleton` of bare modules), :mod:`.adopting` takes over a changed structure,
:mod:`.extra_state` what modules keep beside tensors. :mod:`.sharding` handles FSDP,
:mod:`.partitions` ZeRO-3. May import ``engine`` and ``offloading``.
"""

from __future__ import annotations

from ema_fused.modules.exchanging import Exchange
from ema_fused.modules.paired_module import PairedModule
from ema_fused.modules.pairing import Pairing

__all__ = ["Exchange", "PairedModule", "Pairing"]
