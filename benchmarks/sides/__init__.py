"""The sides of a comparison: what a worker process can build."""
