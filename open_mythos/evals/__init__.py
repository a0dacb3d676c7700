"""What a model is worth, measured on data."""
