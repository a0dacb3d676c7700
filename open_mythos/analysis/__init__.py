"""What a trained model does in each of its loops."""
