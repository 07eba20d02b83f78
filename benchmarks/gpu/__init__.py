"""What only a CUDA device can show, in one script: ``make gpu``, or ``python -m benchmarks.gpu``."""
