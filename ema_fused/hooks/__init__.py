"""Averages inside training frameworks: drop-ins for their hooks, one module a framework.

Each module imports its framework and no other:

* :mod:`ema_fused.hooks.mmengine`: mmengine's averaged models and ``EMAHook``; MMSelfSup's
  ``MomentumUpdateHook`` for mmengine's runners
* :mod:`ema_fused.hooks.mmpretrain`: MMPretrain's ``EMAHook`` and ``CosineEMA``
* :mod:`ema_fused.hooks.mmdet`: mmdet 3.x's ``MeanTeacherHook`` and ``ExpMomentumEMA``
* :mod:`ema_fused.hooks.mmcv`: mmcv 1.x's ``EMAHook``, and those of mmdet 2.x
* :mod:`ema_fused.hooks.mmselfsup`: MMSelfSup 0.x's ``MomentumUpdateHook`` for mmcv 1.x's runners

Importing one registers its classes beside the originals, as ``Fused`` and the original's name.
``register(replace=True)`` of each puts them under the originals' names, so that a config runs
unchanged. May import ``engine``, ``modules`` and ``averages``.
"""
