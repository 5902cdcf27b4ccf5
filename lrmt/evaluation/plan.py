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
from lrmt.models.config import Activations, LongContextConfig
from lrmt.models.cost import NF4_BYTES, Shape, check_known, shape_of, split_flops

FULL = "full"
WIDE = 2  # bytes of a number of the backbone


class Cost(NamedTuple):
    """Of one text: FLOPs, and bytes of the state that is kept and of what layers leave while they run."""

    flops: float
    state: float
    activations: float


#: settings of methods that costs depend on most, told beside them
COUNTED = ("segment_length", "num_memory_tokens", "association_dim", "context_length", "block_length", "top_k")


def run_plan(settings: PlanSettings) -> None:
    """Prints a table of the costs, and writes them where asked to. Of methods that nobody named, those that cannot be planned so are left
    out, each with a line.
    """
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
    records, left_out, configs = [], {}, {}
    for tokens in settings.tokens:
        full = cost_of(None, shape, tokens, settings.training)
        for name in settings.method or names:
            try:
                if name not in configs:
                    configs[name] = build_config(name, settings, backbone_config)
                cost = cost_of(configs[name], shape, tokens, settings.training)
            except UsageError as error:
                if settings.method:
                    raise
                left_out.setdefault((name, str(error)), tokens)
                continue
            seconds = {} if settings.rate is None else {"seconds": cost.flops / (settings.rate * 1e12)}
            records.append(
                {"method": name, "tokens": tokens} | cost._asdict() | {"less": full.flops / cost.flops} | seconds
            )
    print(describe(settings, shape, records))
    for name, config in configs.items():
        if config is not None and any(row["method"] == name for row in records):
            own = {field.name for field in config.own_settings()}
            counted = (f"{setting} {getattr(config, setting)}" for setting in COUNTED if setting in own)
            print(f"{name}: {', '.join(counted) or 'no settings'}")
    for (name, why), tokens in left_out.items():
        print(f"{name} is left out from {format_tokens(tokens)} tokens on: {why}")
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
    window, m, block = backbone_config.max_position_embeddings, settings.num_memory_tokens, settings.block_length
    given = {"segment_length": min(1024, window - 3 * m), "context_length": min(2048, window * (block - 1) // block)}
    given |= {name: value for name, value in vars(settings).items() if value is not None}
    return kind(backbone_config=backbone_config, **{name: given[name] for name in known & given.keys()})


def cost_of(config: LongContextConfig | None, shape: Shape, tokens: int, training: bool) -> Cost:
    """Reading a text of so many tokens, or one step of training on it, of a frozen backbone under LoRA, which is a hundredth of it and
    left out. What a training step keeps of the text is what `--dry_run` estimates.
    """
    if config is None:
        attention, rest = split_flops(lambda shape: shape.run(tokens), shape)
        flops = 3 * attention + 2 * rest if training else attention + rest
        kept = Activations(tokens, 1, 0)
        numbers, single = 2 * shape.layers * shape.keys * tokens, 0
    else:
        segments = -(-tokens // config.segment_length)
        if training:
            config.check_training(segments)
        flops = (config.train_flops if training else config.read_flops)(shape, tokens)
        kept = config.activations(segments)
        numbers, single = config.state_numbers(shape, tokens)
    if not training:
        return Cost(flops, numbers * WIDE + single * 4, WIDE * shape.layer_numbers(kept.positions))
    state = shape.width * (kept.carried * WIDE + kept.single * 4)
    return Cost(flops, state, WIDE * shape.layers * kept.live * shape.layer_numbers(kept.positions))


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
