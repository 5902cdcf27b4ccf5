"""Long memory for pretrained LLaMA and Mistral."""

import logging
from importlib import import_module

__version__ = "0.1.0"

# on import bitsandbytes warns of every optional kernel that it lacks
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_EXPORTS = {
    "LandmarkConfig": "lrmt.models",
    "LandmarkForCausalLM": "lrmt.models",
    "RmtConfig": "lrmt.models",
    "RmtForCausalLM": "lrmt.models",
    "load": "lrmt.adapters.adapter",
}


def __getattr__(name: str):
    # torch and transformers take seconds to import: only when something needs them
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'lrmt' has no attribute {name!r}")


def __dir__():
    return [*globals(), *_EXPORTS]
