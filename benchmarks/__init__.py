"""What is measured of ema_fused, and how it is drawn: ``python -m benchmarks`` measures."""

NO_GPU = 77  # the exit status by which a program says that it was skipped
