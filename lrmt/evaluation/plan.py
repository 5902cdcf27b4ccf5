"""`lrmt plan`: what each method's reading of a text costs, beside full attention."""

from __future__ import annotations

import math
from typing import NamedTuple

from lrmt.adapters.backbone import build_empty, read_backbone_config
from lrmt.errors import UsageError, suggest
from lrmt.evaluation.planning import PlanSettings
from lrmt.evaluation.plots import draw_costs
from lrmt.files import check_writable, to_json, write_files
from lrmt.lengths import format_tokens
from lrmt.models import METHODS
from lrmt.models.config import LongContextConfig
from lrmt.models.cost import NF4_BYTES, Shape, check_known, shape_of

FULL = "full"
WIDE = 2  # bytes of a number of the backbone


class Cost(NamedTuple):
    """Of one text: FLOPs, and bytes of the state that is kept and of what layers leave while they run."""

    flops: float
    state: float
    activations: float


def run_plan(settings: PlanSettings) -> None:
    """Prints a table of the costs, and writes them where asked to."""
    names = (FULL, *METHODS)
    for name in settings.method or ():
        if name not in names:
            raise UsageError(f"--method must be of {', '.join(names)}; got {name!r}{suggest(name, names)}")
    backbone_config = read_backbone_config(settings.model, flag="--model")
    backbone = build_empty(backbone_config)
    check_known(backbone, f"--model {settings.model}")
    shape = shape_of(backbone)
    if settings.output_dir is not None:
        check_writable(settings.output_dir)
    methods = {name: build_config(name, settings, backbone_config) for name in settings.method or names}
    records = []
    for tokens in settings.tokens:
        full = cost_of(None, shape, tokens, settings.training)
        for name, config in methods.items():
            cost = cost_of(config, shape, tokens, settings.training)
            seconds = {} if settings.rate is None else {"seconds": cost.flops / (settings.rate * 1e12)}
            records.append(
                {"method": name, "tokens": tokens} | cost._asdict() | {"less": full.flops / cost.flops} | seconds
            )
    print(describe(settings, shape, records))
    if settings.output_dir is not None:
        files = {"cost.json": to_json(records), "cost.png": draw_costs(records)}
        write_files(settings.output_dir, files)
        print(f"\n{' and '.join(files)} are in {settings.output_dir}")


def build_config(name: str, settings: PlanSettings, backbone_config) -> LongContextConfig | None:
    """The method's settings, as far as it has them; None: full attention, which has none."""
    if name == FULL:
        return None
    kind = METHODS[name].config_class
    known = {field.name for field in kind.own_settings()}
    return kind(backbone_config=backbone_config, **{k: v for k, v in vars(settings).items() if k in known})


def cost_of(config: LongContextConfig | None, shape: Shape, tokens: int, training: bool) -> Cost:
    """Reading a text of so many tokens, or one step of training on it.

    In training frozen weights pass gradients through, which costs as much as going forward, attention twice as much; recurrent methods
    run each segment once more. LoRA itself is left out, a hundredth of the weights.
    """
    if config is None:
        matrices = shape._replace(attention=0).run(tokens)
        attention = shape.run(tokens) - matrices
        numbers, single, positions = 2 * shape.layers * shape.keys * tokens, 0, tokens
        live, again = 1, False
    else:
        flops_of = config.train_flops if training else config.read_flops
        matrices = flops_of(shape._replace(attention=0), tokens)
        attention = flops_of(shape, tokens) - matrices
        numbers, single = config.state_numbers(shape, tokens)
        segments = -(-tokens // config.segment_length)
        if training:
            config.check_training(segments)
        kept = config.activations(segments)
        positions, again = kept.positions, config.runs_again
        live = 1 if again or not training else kept.live
    flops = matrices + attention
    if training:
        flops += matrices + 2 * attention + (flops if again else 0)
    layers = shape.layers if training else 1
    return Cost(flops, numbers * WIDE + single * 4, WIDE * layers * live * shape.layer_numbers(positions))


def describe(settings: PlanSettings, shape: Shape, records: list[dict]) -> str:
    bytes_ = shape.weights * WIDE - shape.matrices * (WIDE - NF4_BYTES) * settings.load_in_4bit
    what = "a training step of one text" if settings.training else "reading a text"
    lines = [
        f"{settings.model}: {shape.weights:,} parameters, {format_bytes(bytes_)} in {4 if settings.load_in_4bit else 16} bits; {what}",
        f"{'tokens':>8}  {'method':<14}{'FLOPs':>10}{'less than full':>16}{'state':>12}{'activations':>14}"
        + f"{'time':>12}" * (settings.rate is not None),
    ]
    for row in records:
        lines.append(
            f"{format_tokens(row['tokens']):>8}  {row['method']:<14}{row['flops']:>10.2e}{'× ' + format(row['less'], '.1f'):>16}"
            f"{format_bytes(row['state']):>12}{format_bytes(row['activations']):>14}"
            + (f"{format_seconds(row['seconds']):>12}" if settings.rate is not None else "")
        )
    return "\n".join(lines)


def format_bytes(size: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    value = size / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 100 or not power else f"{value:.1f} {units[power]}"


def format_seconds(seconds: float) -> str:
    for unit, least in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * least:
            return f"{seconds / least:.1f} {unit}"
    return f"{seconds:.2g} s"
