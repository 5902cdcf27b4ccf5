"""Adapters and their backbones on disk and in memory, without anything of training."""

from lrmt.adapters.adapter import load

__all__ = ["load"]
