"""Round times of FederatedStrategy beside hand-written loops and other simulators: ``python -m benchmarks``."""
