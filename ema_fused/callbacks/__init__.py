"""Averages inside training loops of other libraries, one module a library.

* :mod:`ema_fused.callbacks.huggingface`: the ``Trainer`` of transformers
* :mod:`ema_fused.callbacks.accelerate`: loops of Hugging Face's ``accelerate``
* :mod:`ema_fused.callbacks.lightning`: Lightning's ``WeightAveraging`` callbacks

May import ``engine``, ``modules``, ``averages`` and ``adapters``.
"""
