"""What makes memory form, and last: the tiny recipe with one thing changed at a time, the same texts and steps, three seeds each.

    python benchmarks/memory_candidates.py --output_dir runs/candidates

Each run trains on pass keys of at most 5 segments, 450 steps of 8 texts, and answers 200 new texts of each length, up to 32 segments; two
minutes on one core. What a run was, and gave, is kept in its folder: with the same settings it is not made again, so a stopped call
goes on, and two calls with other --seeds share the work. The table is of all runs with these settings that are there. What did not
help lives here alone, each as a method of a few lines.
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
from lrmt.files import digest, to_json, write_whole
from lrmt.models import METHODS, RmtConfig, RmtForCausalLM
from lrmt.models.handover import HandOver
from lrmt.training.recipe import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "configs" / "rmt_tiny_llama.yaml"
LENGTHS = [2, 8, 32]
STEPS = [200, 100, 150]
KEPT = "settings.json"  #: in a run's folder: how it was trained, how each stage ended, how it was measured, and what it answered
FORMED = 0.9  #: held-out accuracy at the end of the first stage that only a memory gives


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
        written = super().write(memory, output)
        old, new, bias = self.gate(torch.arange(3, device=memory.device))
        share = (memory @ old + written @ new + bias.mean()).sigmoid()[..., None]
        return memory + share * (written - memory)


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

    def _rows(self, table, dtype):
        rows = super()._rows(table, dtype)
        if table is not self.memory_embedding:
            return rows
        return rows @ self.memory_map(torch.arange(rows.shape[-1], device=rows.device)).to(dtype)


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

_PAPER = {
    "notes_weight": 0, "memory_handover": "identity", "memory_shift": False, "memory_positions": False, "state_passing": 0,
    "memory_noise": 0,
}  # fmt: skip
VARIANTS = {  # what depends on --steps is a function of them
    "as the recipe": {},
    "no notes": {"notes_weight": 0},
    "hand-over identity": {"memory_handover": "identity"},
    "hand-over scaled": {"memory_handover": "scaled"},
    "hand-over aligned": {"memory_handover": "aligned"},
    "no shift": {"memory_shift": False},
    "no positions": {"memory_positions": False},
    "no state passing": {"state_passing": 0},
    "no noise": {"memory_noise": 0},
    "the paper's, answers alone": _PAPER,
    "one jump, 2 to 5": {"curriculum_stages": [2, 5], "stage_max_steps": lambda steps: [steps[0], sum(steps[1:])]},
    "batches of 16, half the steps": {
        "per_device_train_batch_size": 16,
        "stage_max_steps": lambda steps: [max(1, n // 2) for n in steps],
    },
    "β2 0.999": {"adam_beta2": 0.999},
    "gradients cut to 0.1": {"max_grad_norm": 0.1},
    "straight-through": {"method": "rmt_straight"},
    "gated residual": {"method": "rmt_gated"},
    "map on M_0": {"method": "rmt_mapped"},
    "segments of 32 to 64": {"method": "rmt_varying"},
}


def flags(settings: dict) -> list[str]:
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def training_of(variant: str, seed: int, steps: list[int]) -> dict:
    """The settings of a run's training, beside those of the recipe, which is told by its digest."""
    changed = {name: value(steps) if callable(value) else value for name, value in VARIANTS[variant].items()}
    return {
        "curriculum_stages": [2, 3, 5], "stage_max_steps": steps, "promotion_accuracy": 1.0, "eval_steps": 100_000,
        "save_strategy": "no", "disable_tqdm": True, "seed": seed, "recipe": digest(RECIPE.read_text()),
    } | changed  # fmt: skip


def measuring_of(args) -> dict:
    return {"lengths": sorted(set(args.lengths)), "num_samples": args.num_samples}


def place_of(variant: str, seed: int | str, args) -> Path:
    """The file of what is kept of a run."""
    return Path(args.output_dir, f"{variant.replace(' ', '_')}-{seed}", KEPT)


def read_runs(variant: str, args) -> dict[int, dict]:
    """By seed, what is kept of a variant's finished runs with these settings, whatever call has made them."""
    place = place_of(variant, "*", args)
    kept = [json.loads(path.read_text()) for path in sorted(place.parents[1].glob(f"{place.parent.name}/{KEPT}"))]
    runs = {run["training"]["seed"]: run for run in kept if run.get("measuring") == measuring_of(args)}
    return {seed: run for seed, run in runs.items() if run["training"] == training_of(variant, seed, args.steps)}


def run_one(variant: str, seed: int, args) -> None:
    """Trains a run, unless that is done, and measures it."""
    METHODS.update(TRIED)
    training, measuring = training_of(variant, seed, args.steps), measuring_of(args)
    place = place_of(variant, seed, args)
    kept = json.loads(place.read_text()) if place.is_file() else {}
    if kept.get("training") != training:
        place.unlink(missing_ok=True)
        settings = training | {"output_dir": place.parent, "overwrite_output_dir": True}  # a kill leaves half a run
        del settings["recipe"]
        method = settings.pop("method", "rmt")
        trainer = run_recipe(method, default_config=RECIPE, description=__doc__, args=flags(settings))
        kept = {"training": training, "stages": stage_ends(trainer.state.log_history)}
        write_whole(place, to_json(kept))
    measured = place.parent / "measured"
    told = flags(measuring | {"seed": 1000 + seed, "output_dir": measured})
    command = ["evaluate", "--adapter_path", str(place.parent), "--task", "passkey", *told, "--baseline", "--overwrite"]
    if code := lrmt_command(command):  # interrupted
        sys.exit(code)
    accuracy = {r["segments"]: r["accuracy"] for r in json.loads((measured / "results.json").read_text())}
    write_whole(place, to_json(kept | {"measuring": measuring, "accuracy": accuracy}))


def stage_ends(log: list[dict]) -> list[dict]:
    """Held-out accuracy of the answers, and of what the memory says, at the end of each stage: it is asked at no other time."""
    names = ("eval_segments", "eval_accuracy", "eval_notes_accuracy")
    return [{name: entry[name] for name in names if name in entry} for entry in log if "eval_segments" in entry]


def build_row(variant: str, runs: list[dict]) -> dict:
    """A line of the table."""
    formed = sum(run["stages"][0]["eval_accuracy"] >= FORMED for run in runs)
    row = {"changed": variant, "seeds": len(runs), "formed": formed}
    for n in runs[0]["accuracy"]:
        right = [100 * run["accuracy"][n] for run in runs]
        row[n] = f"{sum(right) / len(right):.0f} ({min(right):.0f})"
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME", help="default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument("--steps", nargs=3, type=int, default=STEPS, help="of the stages of 2, 3 and 5 segments")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="in segments")
    parser.add_argument("--num_samples", type=int, default=200, help="texts of each length")
    parser.add_argument("--output_dir", default="runs/candidates", help="of the runs and memory_candidates.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one[0], int(args.one[1]), args)
    for seed in args.seeds:
        for variant in args.variants:
            if seed not in read_runs(variant, args):
                print(f"{variant}, seed {seed}", flush=True)
                command = [sys.executable, __file__, *sys.argv[1:], "--one", variant, str(seed)]
                subprocess.run(command, env={**os.environ, **QUIET}, check=True)
    there = {variant: [*read_runs(variant, args).values()] for variant in VARIANTS}
    rows = [build_row(variant, runs) for variant, runs in there.items() if runs]
    print("exact match in % by segments: the mean and, in brackets, the lowest of the seeds;")
    print(f"formed: of how many seeds the first stage ended with {FORMED:.0%} or more")
    write_report("memory_candidates", args.output_dir, {"steps": args.steps} | measuring_of(args), rows)


if __name__ == "__main__":
    main()
