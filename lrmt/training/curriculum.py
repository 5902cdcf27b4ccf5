"""Stages of growing segment counts, promoted by accuracy on held-out samples (Bulatov et al. 2023, §4: curriculum)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lrmt.errors import UsageError


@dataclasses.dataclass
class Curriculum:
    """Where training stands: a pure function of its fields, which a checkpoint keeps.

    Args:
        stages: longest text of each stage, in segments. max_steps: step limit of each stage (one number: of every stage).
        promotion_accuracy: a stage ends early once held-out accuracy, 0..1, at its longest text reaches this. The last
            one has none to promote to: it ends at its limit, where its learning-rate schedule ends.
        vary_lengths: draw min_segments..n segments in stage n, else always n. seed: of those draws.
        slack: tokens by which `vary_lengths` may cut a text short besides, so that it ends anywhere in a block of attention.
    """

    stages: list[int]
    max_steps: list[int]
    promotion_accuracy: float = 0.95
    vary_lengths: bool = True
    seed: int = 0
    min_segments: int = 1
    slack: int = 0
    stage: int = 0
    stage_step: int = 0
    finished: bool = False
    history: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if not self.stages or any(n < 1 for n in self.stages):
            raise UsageError(f"`--curriculum_stages` must be segment counts of 1 or more; got {self.stages}")
        if sorted(self.stages) != list(self.stages):
            raise UsageError(f"`--curriculum_stages` must not shrink; got {self.stages}. Sort them")
        if len(self.max_steps) == 1:
            self.max_steps = self.max_steps * len(self.stages)
        if len(self.max_steps) != len(self.stages) or any(n < 1 for n in self.max_steps):
            raise UsageError(
                f"`--stage_max_steps` must be one number or one per stage, each 1 or more; got {self.max_steps} for "
                f"{len(self.stages)} stages (where it is not a flag, it comes from the configuration)"
            )
        if self.min_segments < 1:
            raise UsageError(f"`--min_segments` must be 1 or more; got {self.min_segments}")
        if not 0 < self.promotion_accuracy <= 1:
            raise UsageError(f"`--promotion_accuracy` must lie in (0, 1]; got {self.promotion_accuracy}")

    def per_stage(self, flag: str, values: Sequence[float]) -> list[float]:
        """One value for each stage, of a flag that takes one number for all of them, or one for each."""
        if len(values) not in (1, len(self.stages)):
            raise UsageError(
                f"`--{flag}` must be one number, or one for each of {len(self.stages)} stages; got {list(values)}"
            )
        return list(values) * (len(self.stages) if len(values) == 1 else 1)

    @property
    def segments(self) -> int:
        """The longest text of the present stage."""
        return self.stages[self.stage]

    @property
    def progress(self) -> float:
        """0 in the first of several stages, 1 in the last."""
        return self.stage / (len(self.stages) - 1) if len(self.stages) > 1 else 1.0

    @property
    def total_steps(self) -> int:
        return sum(self.max_steps)

    def draw_segments(self, step: int) -> int:
        """How many segments every rank trains on at this global step."""
        if not self.vary_lengths:
            return self.segments
        return int(
            np.random.default_rng([self.seed, step, self.stage]).integers(
                min(self.min_segments, self.segments), self.segments + 1
            )
        )

    def draw_length(self, step: int, segment_length: int) -> int:
        """How many tokens every rank's texts have at this global step."""
        length = self.draw_segments(step) * segment_length
        if self.vary_lengths and self.slack:
            length -= int(np.random.default_rng([self.seed, step, self.stage, 1]).integers(self.slack + 1))
        return length

    def advance(self) -> bool:
        """Counts one step; True when the stage's limit is reached and an evaluation must decide."""
        self.stage_step += 1
        return self.stage_step >= self.max_steps[self.stage]

    def report(self, accuracy: float) -> str | None:
        """Takes the held-out accuracy, 0..1, and returns why the stage ends, or None if it goes on."""
        segments, step = self.segments, self.stage_step
        last = self.stage + 1 == len(self.stages)
        if accuracy >= self.promotion_accuracy and not last:
            why = f"accuracy {accuracy:.3f} reached {self.promotion_accuracy:.3f} after {step} steps"
        elif step >= self.max_steps[self.stage]:
            why = f"step limit {step} reached with accuracy {accuracy:.3f}"
        else:
            return None
        message = f"stage {self.stage + 1} of {len(self.stages)} ({segments} segments) ends: {why}; "
        message += "curriculum finished" if last else f"next: up to {self.stages[self.stage + 1]} segments"
        self.history.append(message)
        if last:
            self.finished = True
        else:
            self.stage, self.stage_step = self.stage + 1, 0
        return message

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict) -> None:
        """Takes up the position of a checkpoint; refuses one of another curriculum."""
        for name in ("stages", "max_steps", "vary_lengths", "min_segments", "seed"):
            if state[name] != getattr(self, name):
                raise UsageError(
                    f"`--resume_from_checkpoint`: the checkpoint was trained with {name} = {state[name]}, this run has "
                    f"{getattr(self, name)}; use the same curriculum flags"
                )
        for name in ("stage", "stage_step", "finished", "history"):
            setattr(self, name, state[name])
