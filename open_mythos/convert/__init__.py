"""Weights of other implementations, converted to this one."""
