"""Averages in the training loops of other libraries, one module per library.

* :mod:`ema_fused.callbacks.huggingface`: the ``Trainer`` of transformers
* :mod:`ema_fused.callbacks.accelerate`: training loops with Hugging Face's ``accelerate``
* :mod:`ema_fused.callbacks.lightning`: Lightning's ``WeightAveraging`` callbacks
* :mod:`ema_fused.callbacks.trl`: TRL's callbacks that keep averages

May import ``engine``, ``modules``, ``saving``, ``posthoc``, ``averages`` and ``adapters``.
"""
