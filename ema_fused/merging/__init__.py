"""Averages of checkpoints on disk, summed in pieces: ``python -m ema_fused merge``.

:mod:`.recognising` says of what format a path is, and reads its layout (names, and
:mod:`.stored_tensors` without their values) by :mod:`.safetensors_layout`, :mod:`.torch_layout` or
:mod:`.distributed_layout`.

:mod:`.merge_files` finds out what several have in common (:mod:`.choosing`, :mod:`.comparing`),
reads them in parts (:mod:`.streaming`), adds up (:mod:`.adding_up`, by :mod:`.summing` and the
:mod:`.weights` of a schedule), and writes to :mod:`.outputs` of any of the formats.
May import ``engine``, ``posthoc`` and ``saving``.
"""

from __future__ import annotations

from ema_fused.merging.merge_files import Input, Record, merge
from ema_fused.merging.recognising import Checkpoint, open_checkpoint, read_contents
from ema_fused.merging.stored_tensors import Contents, StoredTensor
from ema_fused.merging.weights import weights_of

__all__ = [
    "Checkpoint",
    "Contents",
    "Input",
    "Record",
    "StoredTensor",
    "merge",
    "open_checkpoint",
    "read_contents",
    "weights_of",
]
