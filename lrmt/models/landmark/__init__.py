"""Landmark attention: random access to any block of the past."""

from lrmt.models.landmark.attention import landmark_attention
from lrmt.models.landmark.model import LandmarkConfig, LandmarkForCausalLM
from lrmt.models.landmark.state import LandmarkState

__all__ = ["LandmarkConfig", "LandmarkForCausalLM", "LandmarkState", "landmark_attention"]
