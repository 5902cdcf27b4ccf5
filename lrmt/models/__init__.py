"""Memory methods: tensors in, tensors out."""

from lrmt.models.base import LongContextConfig, LongContextModel, LongContextOutput, State
from lrmt.models.landmark import LandmarkConfig, LandmarkForCausalLM, LandmarkState
from lrmt.models.rmt import RmtConfig, RmtForCausalLM, RmtState

__all__ = [
    "LandmarkConfig",
    "LandmarkForCausalLM",
    "LandmarkState",
    "LongContextConfig",
    "LongContextModel",
    "LongContextOutput",
    "RmtConfig",
    "RmtForCausalLM",
    "RmtState",
    "State",
]
