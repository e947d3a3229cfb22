"""The EMA wrappers of other packages with our update, one module per package.

* :mod:`ema_fused.adapters.swa_utils`: ``torch.optim.swa_utils``
* :mod:`ema_fused.adapters.timm`: timm's ``ModelEmaV2`` and ``ModelEmaV3``
* :mod:`ema_fused.adapters.diffusers`: diffusers' ``EMAModel``
* :mod:`ema_fused.adapters.ema_pytorch`: ema-pytorch's ``EMA``
* :mod:`ema_fused.adapters.torch_ema`: torch-ema's ``ExponentialMovingAverage``
* :mod:`ema_fused.adapters.ultralytics`: ultralytics' ``ModelEMA``
* :mod:`ema_fused.adapters.torchtitan`: torchtitan's ``EMA``

Each module imports its package and no other, and has a class with the name of the original, derived
from it (torchtitan's from ``OptimizersContainer``, as the original is): the same arguments, methods
and ``state_dict``. :func:`accelerate` converts an existing instance, but torchtitan's.
:mod:`ema_fused.adapters.torchtitan_keys` converts checkpoints of torchtitan's to those of ours and
back. PEFT has no average of its own: :mod:`ema_fused.adapters.peft` makes its adapters of ours.
May import ``engine``, ``modules``, ``averages`` and ``offloading``.
"""

from __future__ import annotations

from ema_fused.adapters.accelerating import accelerate

__all__ = ["accelerate"]
