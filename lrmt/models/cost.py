"""What reading costs: matrix products of a decoder, counted, and the numbers that each method adds to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedModel

from lrmt.errors import UsageError
from lrmt.models.weights import behind_attention, layers_of

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its block's constant, that constant's own block


class Shape(NamedTuple):
    """A decoder: `matrices`, the weights of its layers' linear maps; `attention`, its heads × their size, `keys`, those of keys; `head`,
    the weights of the language-model head; `weights`, all that it has; `inner`, the width of its MLP; `tail`, of `matrices` those behind
    the attention of the last layer.
    """

    matrices: int
    layers: int
    width: int
    attention: int
    keys: int
    head: int
    weights: int
    inner: int
    tail: int

    def run(self, queries: float, keys: float | None = None) -> float:
        """FLOPs of so many positions that each attend to `keys` positions (default: all of them, as attention without a kernel of its own
        computes it); a product of matrices `[a, b]` and `[b, c]` is 2abc, as torch's counter has it.
        """
        keys = queries if keys is None else keys
        return 2 * queries * self.matrices + 4 * self.layers * self.attention * queries * keys

    def layer_numbers(self, positions: int) -> int:
        """Numbers that a layer leaves of so many positions: residual, norms, q, k, v, o, and the MLP's three wide tensors."""
        return positions * (8 * self.width + 3 * self.inner)


def split_flops(flops_of: Callable[[Shape], float], shape: Shape) -> tuple[float, float]:
    """Of what a decoder of some shape costs: what attention does, and the rest."""
    rest = flops_of(shape._replace(attention=0))
    return flops_of(shape) - rest, rest


def shape_of(backbone: PreTrainedModel) -> Shape:
    """Of a transformers decoder, on the meta device too."""
    config, layers = backbone.config.get_text_config(), layers_of(backbone)
    ends = {
        id(w) for part in (backbone.get_input_embeddings(), backbone.get_output_embeddings()) for w in part.parameters()
    }
    inside = [w for part in layers or [backbone] for w in part.parameters() if w.dim() == 2 and id(w) not in ends]
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        matrices=sum(weight.numel() for weight in inside),
        layers=len(layers) or config.num_hidden_layers,
        width=config.hidden_size,
        attention=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        head=config.vocab_size * config.hidden_size,
        weights=sum(parameter.numel() for parameter in backbone.parameters()),
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        tail=sum(
            w.numel()
            for layer in layers[-1:]
            for part in behind_attention(layer)
            for w in part.parameters()
            if w.dim() == 2
        ),
    )


def check_known(backbone: PreTrainedModel, flag: str) -> None:
    """Raises UsageError for a decoder that computes otherwise than with attention and all of its matrices."""
    layers = layers_of(backbone)
    plain = all(weight.dim() <= 2 for layer in layers for weight in layer.parameters())
    if not layers or not plain or not getattr(backbone.config.get_text_config(), "num_attention_heads", None):
        raise UsageError(
            f"{flag}: {type(backbone).__name__} is no decoder whose cost is known: it needs layers of attention and plain matrices, no "
            "experts. Name a LLaMA, Mistral, Qwen, …"
        )
