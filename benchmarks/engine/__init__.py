"""What the engine's batches are worth: `python -m benchmarks.engine`."""
