"""Correctness and speed on a CUDA device in one command: ``python -m benchmarks.gpu --help``."""
