"""Drop-in replacements for the averaging hooks of training frameworks, one module each.

Each module imports its framework and no other:

* :mod:`ema_fused.hooks.mmengine`: mmengine's averaged models and ``EMAHook``; MMSelfSup's
  ``MomentumUpdateHook`` for mmengine's runners
* :mod:`ema_fused.hooks.mmpretrain`: MMPretrain's ``EMAHook`` and ``CosineEMA``
* :mod:`ema_fused.hooks.mmdet`: mmdet 3.x's ``MeanTeacherHook`` and ``ExpMomentumEMA``
* :mod:`ema_fused.hooks.mmcv`: mmcv 1.x's ``EMAHook``, and those of mmdet 2.x
* :mod:`ema_fused.hooks.mmselfsup`: MMSelfSup 0.x's ``MomentumUpdateHook`` for mmcv 1.x's runners

Importing a module registers its classes in addition to the originals, under the original's name
with ``Fused`` in front. ``register(replace=True)`` of the module also registers them under the
originals' names, so that a config runs unchanged. May import ``engine``, ``modules`` and
``averages``.
"""
