"""Benchmarks against peers and against the machine's own limits: `python -m benchmarks`, `make bench`.

The coordinator (`__main__`, `bench`, `cases/`) times workers, one process for each side of a comparison, in turn.
"""
