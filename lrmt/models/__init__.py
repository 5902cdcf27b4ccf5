"""Memory methods: tensors in, tensors out."""

from lrmt.models.armt import ArmtConfig, ArmtForCausalLM
from lrmt.models.base import LongContextModel
from lrmt.models.config import LongContextConfig, RecurrentConfig
from lrmt.models.landmark import LandmarkConfig, LandmarkForCausalLM, LandmarkState
from lrmt.models.memory import RecurrentState
from lrmt.models.outputs import LongContextOutput
from lrmt.models.recording import Recording, Span, Written
from lrmt.models.recurrent import RecurrentModel
from lrmt.models.rmt import RmtConfig, RmtForCausalLM
from lrmt.models.rmt_retrieval import RmtRetrievalConfig, RmtRetrievalForCausalLM
from lrmt.models.state import State

#: every method, by the name that its config has: read by recipes, flags, loading, exports and tests
METHODS: dict[str, type[LongContextModel]] = {
    "rmt": RmtForCausalLM,
    "rmt_retrieval": RmtRetrievalForCausalLM,
    "armt": ArmtForCausalLM,
    "landmark": LandmarkForCausalLM,
}

__all__ = [
    "METHODS",
    "ArmtConfig",
    "ArmtForCausalLM",
    "LandmarkConfig",
    "LandmarkForCausalLM",
    "LandmarkState",
    "LongContextConfig",
    "LongContextModel",
    "LongContextOutput",
    "Recording",
    "RecurrentConfig",
    "RecurrentModel",
    "RecurrentState",
    "RmtConfig",
    "RmtForCausalLM",
    "RmtRetrievalConfig",
    "RmtRetrievalForCausalLM",
    "Span",
    "State",
    "Written",
]
