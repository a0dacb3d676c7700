"""The engine: many requests at once, each at its own depth."""
