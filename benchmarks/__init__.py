"""Where rnnkern stands against its peers and against the hardware's limit: ``python -m benchmarks.run``."""
