"""Adapters and their backbones on disk and in memory, without anything of training."""
