"""lm-evaluation-harness on an lrmt model."""
