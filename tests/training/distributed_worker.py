"""Trains as a recipe does; then every rank writes to `rank<N>.pt` what the tests want to know of it.

METHOD=rmt accelerate launch --config_file ds_configs/zero3_2cpu.yaml tests/training/distributed_worker.py --output_dir DIR [flags]
"""

import os
import time
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit

from lrmt.errors import TrainingFault
from lrmt.training import trainer as trainer_module
from lrmt.training.recipe import parse_recipe
from lrmt.training.run import train

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
METHOD = os.environ.get("METHOD", "rmt")


def train_with(flags: list[str] | None):
    return train(*parse_recipe(METHOD, default_config=CONFIGS / f"{METHOD}_tiny_llama.yaml", args=flags))


def describe_parameters(model) -> dict[str, dict]:
    """Per parameter: elements in all, elements that this rank keeps, dtype, and whether it trains."""
    return {
        name: {
            "numel": getattr(p, "ds_numel", p.numel()),
            "kept": p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel(),
            "dtype": p.dtype,
            "trains": p.requires_grad,
        }
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def known_logits(trainer) -> tuple[dict, torch.Tensor]:
    """A held-out batch of two segments, the same on every rank, and its logits at the scored positions."""
    inputs = trainer._draw(trainer.eval_task, 100, 4, 2 * trainer._segment_length)
    trainer.model_wrapped.eval()
    return inputs, trainer.model_wrapped(**inputs).logits.float()


def provoke_guard(trainer) -> tuple[str, float]:
    """What a step says, and after how many seconds, in which rank r is given r + 1 segments."""
    draw, length = trainer._draw, (trainer.args.process_index + 1) * trainer._segment_length
    trainer._draw = lambda task, number, rows, _: draw(task, number, 2, length)
    began = time.perf_counter()
    try:
        trainer.get_batch_samples(iter([0]), 1, trainer.args.device)
    except TrainingFault as error:
        return str(error), time.perf_counter() - began
    finally:
        del trainer._draw
    return "", time.perf_counter() - began


def provoke_nan(trainer) -> str:
    """What the trainer says of a loss that is finite on rank 0 alone; on the way every rank runs its segments once more."""
    inputs = trainer._draw(trainer.train_task, trainer.args.process_index, 2, 3 * trainer._segment_length)
    finite = [rank == 0 for rank in range(trainer.args.world_size)]
    try:
        trainer._explain_nan(trainer.model_wrapped, inputs, finite)
    except TrainingFault as error:
        return str(error)


def count_collectives() -> list[int]:
    """How many numbers the trainer gathers each time, from now on."""
    sizes, gather = [], trainer_module.gather_numbers
    trainer_module.gather_numbers = lambda numbers, device: sizes.append(len(numbers)) or gather(numbers, device)
    return sizes


def main():
    collectives = count_collectives()
    trainer = train_with(None)
    collectives = list(collectives)
    inputs, logits = known_logits(trainer)
    engine = trainer.model_wrapped
    record = {
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0,
        "parameters": describe_parameters(trainer.model),
        "quantised": [n for n, m in trainer.model.named_modules() if isinstance(m, Linear4bit)],
        "log": trainer.state.log_history,
        "curriculum": trainer.curriculum.state_dict(),
        "inputs": inputs,
        "logits": logits,
        "collectives": collectives,
    }
    if METHOD == "rmt":  # in training a landmark model runs its backbone once, whatever the text
        record |= {"guard": provoke_guard(trainer), "nan": provoke_nan(trainer)}
    torch.save(record, Path(trainer.args.output_dir, f"rank{trainer.args.process_index}.pt"))


if __name__ == "__main__":
    main()
