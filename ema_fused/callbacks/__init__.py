"""Averages in the training loops of other libraries, one module per library.

* :mod:`ema_fused.callbacks.huggingface`: the ``Trainer`` of transformers
* :mod:`ema_fused.callbacks.accelerate`: training loops with Hugging Face's ``accelerate``
* :mod:`ema_fused.callbacks.lightning`: Lightning's ``WeightAveraging`` callbacks

May import ``engine``, ``modules``, ``saving``, ``posthoc``, ``averages`` and ``adapters``.
"""
