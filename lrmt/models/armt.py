"""ARMT: an associative memory in every layer of the backbone (Rodkin et al. 2024, arXiv 2407.04841)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.models.config import Activations, RecurrentConfig
from lrmt.models.cost import Shape
from lrmt.models.diagonal import run_diagonally
from lrmt.models.memory import Memory
from lrmt.models.recurrent import RecurrentModel, SegmentOutput
from lrmt.models.scoring import widened
from lrmt.models.segments import Grid
from lrmt.models.weights import in_use, layers_of

ROLLS = 3  # ν of DPFP-ν, the features of keys and queries (Schlag et al. 2021, arXiv 2102.11174, §4.3)
LAYERS_AGAIN = "`--gradient_checkpointing` runs layers a second time without their memory; set `--checkpoint_segments true` instead"
TINY = 1e-5  # ε: what is read of an empty memory is 0


class ArmtConfig(RecurrentConfig):
    """Settings of ARMT. L + m positions must fit into the backbone's window."""

    model_type = "armt"
    reading_settings: ClassVar[tuple[str, ...]] = ("diagonal_batching",)

    num_memory_tokens: int = flag(
        16, "Memory tokens m at the end of each segment, which write to the memory of each layer."
    )
    association_dim: int = flag(64, "Of keys and queries; a layer's memory is a matrix of 6 × this × the hidden size.")
    diagonal_batching: bool = flag(
        False,
        "A text is read by all layers at once, each on the segment that it has come to: many small products become few large ones. "
        "Wants weights in 16 or 32 bits, and room for them twice.",
    )

    def __post_init__(self, **kwargs):
        for name in ("num_memory_tokens", "association_dim"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"`--{name}` must be 1 or more; got {getattr(self, name)}. {type(self).__dataclass_fields__[name].default} is usual"
                )
        if self.memory_handover != "identity" or self.memory_shift:
            raise UsageError(
                "`--memory_handover` and `--memory_shift` are of vectors handed on from segment to segment; ARMT hands on the matrices of "
                "its layers. Leave them out"
            )
        super().__post_init__(**kwargs)

    @property
    def note_length(self) -> int:
        return self.num_memory_tokens

    @property
    def written_positions(self) -> int:
        return self.num_memory_tokens

    @property
    def positions(self) -> int:
        return self.segment_length + self.num_memory_tokens

    @property
    def num_features(self) -> int:
        """p: of a key and a query."""
        return 2 * ROLLS * self.association_dim

    def activations(self, num_segments: int) -> Activations:
        matrices = self.num_hidden_layers * (self.num_features + 1)
        return super().activations(num_segments)._replace(single=matrices * num_segments)

    def check_training(self, num_segments: int, *, gradient_checkpointing: bool = False, **run) -> None:
        if gradient_checkpointing:
            raise UsageError(LAYERS_AGAIN)
        super().check_training(num_segments, **run)

    def segments_flops(self, shape: Shape, tokens: int, first: int, last: int) -> float:
        m, d, p = self.num_memory_tokens, shape.width, self.num_features
        read = 2 * (tokens + m) * (d * self.association_dim + p * d + p)
        write = 2 * m * (d * self.association_dim + d * d + d + 2 * p * d + 2 * p)
        return super().segments_flops(shape, tokens, first, last) + (last - first) * shape.layers * (read + write)

    def state_numbers(self, shape: Shape, tokens: int) -> tuple[int, int]:
        return 0, shape.layers * self.num_features * (shape.width + 1)


class Association(NamedTuple):
    """What one layer remembers: `matrix [B, p, d]`, and `norm [B, p]`, the sum of the keys that were written."""

    matrix: Tensor
    norm: Tensor

    def read(self, query: Tensor) -> Tensor:
        """What is remembered of queries `[B, W, p]`: `[B, W, d]`."""
        with torch.autocast(query.device.type, enabled=False):
            return query @ self.matrix / (query @ self.norm[..., None] + TINY)

    def write(self, key: Tensor, value: Tensor, share: Tensor) -> Association:
        """The delta rule: of keys `[B, m, p]`, values `[B, m, d]` take the place of what was read there, by a share `[B, m, 1]` (§3.2).

        Keys that are remembered already are not counted twice.
        """
        with torch.autocast(key.device.type, enabled=False):
            known = key @ self.norm[..., None] / key.pow(2).sum(-1, keepdim=True).clamp(min=TINY)
            matrix = self.matrix + key.transpose(1, 2) @ (share * (value - self.read(key)))
            return Association(matrix, self.norm + ((1 - known).clamp(0, 1).detach() * key).sum(1))


def features(x: Tensor) -> Tensor:
    """DPFP: `[…, d_mem]` to `[…, 6 d_mem]`, nonnegative and sparse."""
    y = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([y * y.roll(j, dims=-1) for j in range(1, ROLLS + 1)], dim=-1)


class Queries(nn.Module):
    """Of every layer the map from hidden states to what is asked of its memory."""

    def __init__(self, layers: int, width: int, size: int, **place):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, size, bias=False, **place) for _ in range(layers))

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """`[B, W, d]` to `[B, W, p]`, in fp32 or wider."""
        return ask(self.maps[layer], hidden)


class Writers(nn.Module):
    """Of every layer the maps from its memory tokens to keys, values and shares; values begin at zero, so that nothing is remembered."""

    def __init__(self, layers: int, width: int, size: int, **place):
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(width, size, bias=False, **place) for _ in range(layers))
        self.values = nn.ModuleList(nn.Linear(width, width, bias=False, **place) for _ in range(layers))
        self.shares = nn.ModuleList(nn.Linear(width, 1, **place) for _ in range(layers))
        for value in self.values:
            if value.weight.device.type != "meta":
                nn.init.zeros_(value.weight)

    def forward(self, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, m, d]` to keys `[B, m, p]`, values `[B, m, d]` and shares `[B, m, 1]`, in fp32 or wider."""
        return tell(self.keys[layer], self.values[layer], self.shares[layer], hidden)


def ask(query: nn.Linear, hidden: Tensor) -> Tensor:
    return features(_apply(query, hidden))


def tell(key: nn.Linear, value: nn.Linear, share: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return features(_apply(key, hidden)), _apply(value, hidden), _apply(share, hidden).sigmoid()


def _apply(linear: nn.Linear, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return widened(linear(hidden.to(linear.weight.dtype)))


class Cell(nn.Module):
    """A layer with its maps, as a function of its memory: what hooks do around it, in one call."""

    def __init__(self, number: int, layer: nn.Module, queries: Queries, writers: Writers, num_memory_tokens: int):
        super().__init__()
        self.layer, self.query, self.num_memory_tokens = layer, queries.maps[number], num_memory_tokens
        self.writers = nn.ModuleList(maps[number] for maps in (writers.keys, writers.values, writers.shares))

    def forward(self, hidden: Tensor, matrix: Tensor, norm: Tensor, **inputs) -> tuple[Tensor, Tensor, Tensor]:
        now = Association(matrix, norm)
        output = self.layer(hidden + now.read(ask(self.query, hidden)).to(hidden.dtype), **inputs)
        hidden = first_of(output)
        return hidden, *now.write(*tell(*self.writers, hidden[:, -self.num_memory_tokens :]))


def first_of(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class ArmtForCausalLM(RecurrentModel):
    """Before each layer every position adds what the layer's memory says to it; behind it the m memory tokens at the end of the segment
    write. The backbone is as it was, hooks stand around its layers. The memory is the `matrix [B, p, d]` and the `norm [B, p]` of every
    layer, in fp32; it begins empty.
    """

    config_class = ArmtConfig
    state_settings = ("num_memory_tokens", "segment_length", "segment_alignment", "association_dim")
    later_state_settings = ()
    memory_modules = ["memory_embedding", "queries", "writers"]

    def __init__(self, config: ArmtConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.memory_embedding = self.make_embedding(
            config.num_memory_tokens, lambda weight, embeddings: nn.init.normal_(weight, std=float(embeddings.std()))
        )
        layers, weight = layers_of(self.backbone), self.memory_embedding.weight
        if len(layers) != config.num_hidden_layers:
            raise UsageError(
                f"`--model_name_or_path`: {type(self.backbone).__name__} has {len(layers)} layers that ARMT finds, of "
                f"{config.num_hidden_layers}; choose a decoder such as LLaMA, Mistral, Qwen or GPT-2"
            )
        shape = (len(layers), weight.shape[-1], config.association_dim)
        place = {"device": weight.device, "dtype": weight.dtype}
        self.queries, self.writers = Queries(*shape, **place), Writers(*shape, **place)
        self._now: list[Association] | None = None  # while a segment runs: what its layers remember
        self._written: list[Association] | None = None  # and, where memory tokens stand at its end, what they will
        for number, layer in enumerate(layers):
            # of methods, since a copy of the model copies them with it
            layer.register_forward_pre_hook(partial(self._read_before, number))
            layer.register_forward_hook(partial(self._write_behind, number))
        self.finish()

    def start(self, batch_size: int) -> Memory:
        weight = self.get_input_embeddings().weight
        p, d = self.config.num_features, self.config.hidden_size
        zeros = widened(torch.zeros(1, dtype=weight.dtype, device=weight.device))
        return [
            Association(zeros.new_zeros(batch_size, p, d), zeros.new_zeros(batch_size, p))
            for _ in range(self.config.num_hidden_layers)
        ]

    def suffix(self, memory: Memory) -> Tensor:
        index = torch.arange(self.config.num_memory_tokens, device=memory[0].norm.device)
        rows = self.memory_embedding(index).to(self.get_input_embeddings().weight.dtype)
        return rows.expand(len(memory[0].norm), -1, -1)

    def write(self, memory: Memory, output: SegmentOutput) -> Memory:
        written, self._written = self._written, None
        return written

    def shake(self, memory: Memory, noise: float) -> Memory:
        """On each entry of the matrices in proportion to itself: where nothing was written a norm is 0, and any noise would be divided by
        next to nothing.
        """
        return [one._replace(matrix=one.matrix * (1 + noise * torch.randn_like(one.matrix))) for one in memory]

    def fault_of(self, memory: Memory) -> str:
        finite = [all(bool(part.isfinite().all()) for part in one) for one in memory]
        return "" if all(finite) else f", layer {finite.index(False) + 1} of {len(finite)}"

    @contextlib.contextmanager
    def around(self, memory: Memory, ends: bool):
        self._now, self._written = memory, [] if ends else None
        try:
            yield
        finally:
            self._now = None

    @torch.compiler.disable
    def _read_before(self, number: int, layer: nn.Module, args: tuple) -> tuple | None:
        if self._now is None:  # the bare backbone
            return None
        if layer.gradient_checkpointing and layer.training:
            raise UsageError(LAYERS_AGAIN)
        hidden, *others = args
        read = self._now[number].read(self.queries(hidden, number))
        return hidden + read.to(hidden.dtype), *others

    @torch.compiler.disable
    def _write_behind(self, number: int, layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if self._written is not None and self._now is not None:
            hidden = first_of(output)[:, -self.config.num_memory_tokens :]
            self._written.append(self._now[number].write(*self.writers(hidden, number)))

    # ------------------------------------------------------------------ all layers at once

    def _recur(self, grid: Grid, window: range, memory: Memory, noisy: bool = True) -> tuple[list, Memory, list]:
        run, free = super()._recur, grid.wanted is None and grid.notes is None and self._record is None
        whole = [s for s in window if grid.is_whole(s)] if self.config.diagonal_batching and free else []
        if len(whole) < 2 or torch.is_grad_enabled():
            return run(grid, window, memory, noisy)
        begin, end = whole[0] + 1, whole[-1] + 1
        with (
            self._layer_inputs() as inputs
        ):  # the first runs layer by layer, and tells what layers are given besides hidden states
            memory = run(grid, range(window.start, begin), memory, noisy)[1]
        memory = self._read_diagonally((grid[s].ids for s in range(begin, end)), memory, inputs)
        return [], run(grid, range(end, window.stop), memory, noisy)[1], []

    @contextlib.contextmanager
    def _layer_inputs(self):
        """Gives a list of what each layer was called with by name, whole when the context ends."""
        inputs = []
        hooks = [
            layer.register_forward_pre_hook(lambda layer, args, kwargs: inputs.append(kwargs), with_kwargs=True)
            for layer in layers_of(self.backbone)
        ]
        try:
            yield inputs
        finally:
            for hook in hooks:
                hook.remove()

    def _read_diagonally(self, segments: Iterator[Tensor], memory: Memory, inputs: list[dict]) -> Memory:
        """The memory after segments of one length, of ids `[B, L]`, without padding."""
        layers = layers_of(self.backbone)
        if any(not weight.is_floating_point() for layer in layers for weight in layer.parameters()):
            raise UsageError(
                "`--diagonal_batching` multiplies by the weights of all layers at once, which weights in 4 bits are not there for. Say "
                "`--diagonal_batching false`, or open it with `--dequantize true`"
            )
        inputs = inputs[-len(layers) :]
        if any(one.get("attention_mask") is not inputs[0].get("attention_mask") for one in inputs):
            raise UsageError("`--diagonal_batching` needs layers that all see the same of a segment; leave it out")
        queries, writers, m = in_use(self.queries), in_use(self.writers), self.config.num_memory_tokens
        cells = [Cell(number, layer, queries, writers, m) for number, layer in enumerate(layers)]
        embeds = (torch.cat([self.get_input_embeddings()(ids), self.suffix(memory)], dim=1) for ids in segments)
        stacked = [torch.stack(part) for part in zip(*memory, strict=True)]
        matrices, norms = run_diagonally(cells, embeds, stacked, **inputs[0])
        return [Association(matrix, norm) for matrix, norm in zip(matrices, norms, strict=True)]
