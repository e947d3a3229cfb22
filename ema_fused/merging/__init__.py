"""Averages of checkpoints on disk, summed in pieces: ``python -m ema_fused merge``.

:mod:`.recognising` says of what format a path is, and reads its layout (names, and
:mod:`.stored_tensors` without their values) by :mod:`.safetensors_layout`, :mod:`.torch_layout` or
:mod:`.distributed_layout`.
May import ``engine``, ``posthoc`` and ``saving``.
"""

from __future__ import annotations

from ema_fused.merging.recognising import open_checkpoint, read_contents

__all__ = ["open_checkpoint", "read_contents"]
