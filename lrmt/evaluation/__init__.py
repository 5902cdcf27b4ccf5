"""Accuracy by length, beside the untrained memory and the backbone alone."""
