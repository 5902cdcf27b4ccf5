"""What makes memory form, and last: the tiny recipe with one thing changed at a time, the same texts and steps, three seeds each.

    python benchmarks/memory_candidates.py --output_dir runs/candidates

Each run trains on pass keys of at most 5 segments, 450 steps of 8 texts, and answers 200 new texts of each length, up to 64 segments; two
minutes on one core. Runs that are there already are not made again: a stopped call goes on, and two calls with other --seeds share
the work. What did not help lives here alone, each as a method of a few lines.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import QUIET, write_report
from torch import nn

from lrmt.cli import main as lrmt_command
from lrmt.models import METHODS, RmtConfig, RmtForCausalLM
from lrmt.models.handover import HandOver
from lrmt.training.recipe import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "configs" / "rmt_tiny_llama.yaml"
LENGTHS = (2, 4, 8, 16, 32, 64)


# --- methods that are tried here only ------------------------------------------------------------------------------------


class StraightConfig(RmtConfig):
    model_type = "rmt_straight"


class StraightForCausalLM(RmtForCausalLM):
    """Hands over the embedding of the likeliest token, with the gradient of the mean (straight-through)."""

    config_class = StraightConfig

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.handover = Likeliest(config.memory_handover, self.get_input_embeddings().weight)


class Likeliest(HandOver):
    def forward(self, hidden, logits, embed):
        mean = super().forward(hidden, logits, embed)
        return embed(logits.argmax(-1)) + mean - mean.detach()


class GatedConfig(RmtConfig):
    model_type = "rmt_gated"


class GatedForCausalLM(RmtForCausalLM):
    """Each vector of the memory is a mixture of what it was and what is written; a gate that sees both begins at 0.88 for the new."""

    config_class = GatedConfig
    memory_modules = ["memory_embedding", "gate"]

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.gate = self.make_embedding(3, lambda weight, _: weight.zero_()[2].fill_(2.0))
        self.finish()

    def write(self, memory, output):
        old, new, bias = self.gate(torch.arange(3, device=memory.device))
        share = (memory @ old + output.after @ new + bias.mean()).sigmoid()[..., None]
        return memory + share * (output.after - memory)


class MappedConfig(RmtConfig):
    model_type = "rmt_mapped"


class MappedForCausalLM(RmtForCausalLM):
    """M_0 through a linear map while training, as public code of RMT's authors has it; the two could be multiplied in the end."""

    config_class = MappedConfig
    memory_modules = ["memory_embedding", "memory_map"]

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        width = self.get_input_embeddings().weight.shape[-1]
        self.memory_map = self.make_embedding(width, lambda weight, _: nn.init.eye_(weight))
        self.finish()

    def start(self, batch_size):
        memory = super().start(batch_size)
        return memory @ self.memory_map(torch.arange(memory.shape[-1], device=memory.device))


class VaryingConfig(RmtConfig):
    model_type = "rmt_varying"


class VaryingForCausalLM(RmtForCausalLM):
    """Each batch in segments of its own length, from half of L up."""

    config_class = VaryingConfig

    def _grid(self, input_ids, *args, **kwargs):
        whole = self.config.segment_length
        self.config.segment_length = whole - int(input_ids.sum()) % (whole // 2) if self.training else whole
        try:
            return super()._grid(input_ids, *args, **kwargs)
        finally:
            self.config.segment_length = whole


TRIED = {
    c.config_class.model_type: c for c in (StraightForCausalLM, GatedForCausalLM, MappedForCausalLM, VaryingForCausalLM)
}

# --- what is changed ---------------------------------------------------------------------------------------------------------

_STEPS = [200, 100, 150]
_PAPER = {"notes_weight": 0, "memory_handover": "identity", "memory_shift": False, "state_passing": 0}
VARIANTS = {
    "as the recipe": {},
    "no notes": {"notes_weight": 0},
    "hand-over identity": {"memory_handover": "identity"},
    "hand-over scaled": {"memory_handover": "scaled"},
    "hand-over aligned": {"memory_handover": "aligned"},
    "no shift": {"memory_shift": False},
    "aligned, no shift": {"memory_handover": "aligned", "memory_shift": False},
    "no state passing": {"state_passing": 0},
    "no noise": {"memory_noise": 0},
    "neither passing nor noise": {"state_passing": 0, "memory_noise": 0},
    "the paper's, answers alone": _PAPER,
    "one jump, 2 to 5": {"curriculum_stages": [2, 5], "stage_max_steps": [200, 250]},
    "batches of 16, half the steps": {"per_device_train_batch_size": 16, "stage_max_steps": [n // 2 for n in _STEPS]},
    "β2 0.999": {"adam_beta2": 0.999},
    "straight-through": {"method": "rmt_straight"},
    "gated residual": {"method": "rmt_gated"},
    "map on M_0": {"method": "rmt_mapped"},
    "segments of 32 to 64": {"method": "rmt_varying"},
}


def flags(settings: dict) -> list[str]:
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value).lower()]))
    ]


def run_one(variant: str, seed: int, folder: Path, steps: list[int], lengths: list[int], num_samples: int) -> None:
    """Trains and measures one run."""
    METHODS.update(TRIED)
    settings = {
        "curriculum_stages": [2, 3, 5], "stage_max_steps": steps, "promotion_accuracy": 1.0, "eval_steps": 100_000,
        "save_strategy": "no", "disable_tqdm": True, "seed": seed, "output_dir": folder,
    } | VARIANTS[variant]  # fmt: skip
    method = settings.pop("method", "rmt")
    run_recipe(method, default_config=RECIPE, description=__doc__, args=flags(settings))
    told = {"lengths": lengths, "num_samples": num_samples, "seed": 1000 + seed, "output_dir": folder / "measured"}
    lrmt_command(["evaluate", "--adapter_path", str(folder), "--task", "passkey", *flags(told), "--baseline"])


def read(folder: Path) -> dict[int, float]:
    """Exact match in % by segments; nothing if the run is not there."""
    path = folder / "measured" / "results.json"
    if not path.is_file():
        return {}
    return {r["segments"]: 100 * r["accuracy"] for r in json.loads(path.read_text())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME", help="default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument("--steps", nargs=3, type=int, default=_STEPS, help="of the stages of 2, 3 and 5 segments")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="in segments")
    parser.add_argument("--num_samples", type=int, default=200, help="texts of each length")
    parser.add_argument("--output_dir", default="runs/candidates", help="of the runs and memory_candidates.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.output_dir)
    if args.one:
        place = folder / f"{args.one[0].replace(' ', '_')}-{args.one[1]}"
        return run_one(args.one[0], int(args.one[1]), place, args.steps, args.lengths, args.num_samples)
    rows = []
    for seed in args.seeds:
        for variant in args.variants:
            place = folder / f"{variant.replace(' ', '_')}-{seed}"
            if not read(place):
                print(f"{variant}, seed {seed}", flush=True)
                words = flags({"steps": args.steps, "lengths": [*args.lengths], "num_samples": args.num_samples})
                command = [sys.executable, __file__, "--one", variant, str(seed), "--output_dir", str(folder), *words]
                subprocess.run(command, env={**os.environ, **QUIET}, check=True)
    for variant in args.variants:
        runs = [measured for seed in args.seeds if (measured := read(folder / f"{variant.replace(' ', '_')}-{seed}"))]
        told = {n: f"{sum(r[n] for r in runs) / len(runs):.0f} ({min(r[n] for r in runs):.0f})" for n in args.lengths}
        rows.append({"changed": variant, "seeds": len(runs)} | {str(n): cell for n, cell in told.items()})
    print("exact match in % by segments, mean and, in brackets, the lowest of the seeds")
    write_report("memory_candidates", args.output_dir, vars(args), rows)


if __name__ == "__main__":
    main()
