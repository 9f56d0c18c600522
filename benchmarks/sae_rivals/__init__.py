"""One worker per library for `sae_throughput.py`; each runs in an interpreter that has that library.

Run as `python -m sae_rivals.NAME` from `benchmarks/`, so that a worker's own name does not hide its library's.
"""
