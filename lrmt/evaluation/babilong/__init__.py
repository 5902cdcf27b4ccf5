"""BABILong's public side: prompts, predictions, published figures."""
