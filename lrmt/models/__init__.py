"""Memory methods: tensors in, tensors out."""

from lrmt.models.base import LongContextConfig, LongContextModel, LongContextOutput, State
from lrmt.models.rmt import RmtConfig, RmtForCausalLM, RmtState

__all__ = [
    "LongContextConfig",
    "LongContextModel",
    "LongContextOutput",
    "RmtConfig",
    "RmtForCausalLM",
    "RmtState",
    "State",
]
