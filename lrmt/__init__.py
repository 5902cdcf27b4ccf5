"""Long memory for pretrained LLaMA and Mistral."""

__version__ = "0.1.0"
