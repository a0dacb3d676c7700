"""Experiments, one file each: a question, a protocol, raw numbers, a figure and a report, by one command."""
