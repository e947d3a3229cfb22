"""EMA wrappers that people have, with our update: the wrapper stays, one module a wrapper.

* :mod:`ema_fused.adapters.swa_utils`: ``torch.optim.swa_utils``
* :mod:`ema_fused.adapters.timm`: timm's ``ModelEmaV2`` and ``ModelEmaV3``
* :mod:`ema_fused.adapters.diffusers`: diffusers' ``EMAModel``
* :mod:`ema_fused.adapters.ema_pytorch`: ema-pytorch's ``EMA``
* :mod:`ema_fused.adapters.torch_ema`: torch-ema's ``ExponentialMovingAverage``

Each module imports its package and no other, and has a class of the original's name, derived from
it: the same arguments, methods and ``state_dict``. :func:`accelerate` takes an instance that is
there already. May import ``engine``, ``modules`` and ``averages``.
"""

from __future__ import annotations

from ema_fused.adapters.accelerating import accelerate

__all__ = ["accelerate"]
