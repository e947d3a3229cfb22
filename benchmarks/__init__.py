"""What is measured of ema_fused, and how it is drawn: ``python -m benchmarks`` measures."""
