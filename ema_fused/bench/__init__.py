"""Compares the speed of updates with that of other packages: ``python -m ema_fused bench``.

The benchmarks of the source tree use it too. Data flows one way: a list of shapes
(:mod:`~ema_fused.bench.shapes`) -> contenders on tensors (:mod:`~ema_fused.bench.contenders`) ->
timings (:mod:`~ema_fused.bench.timing`; caches are made cold by :mod:`~ema_fused.bench.touching`, a
machine is kept busy by :mod:`~ema_fused.bench.busy`) -> results
(:mod:`~ema_fused.bench.measuring`) -> tables (:mod:`~ema_fused.bench.tables`). May import
``engine``, and ``ema_fused`` as its users do.
"""
