"""What happens around a step: curriculum decisions and the progress bar."""

from __future__ import annotations

import time

from transformers import TrainerCallback

from lrmt.progress import progress
from lrmt.training.curriculum import Curriculum

NOTES = ("notes_loss", "notes_accuracy", "eval_notes_loss", "eval_notes_accuracy")  # of those logged, what is shown


class CurriculumCallback(TrainerCallback):
    """Evaluates every `eval_steps` of a stage, once `eval_delay` steps are over, and at its limit; stops after the last stage."""

    def __init__(self, curriculum: Curriculum):
        self.curriculum = curriculum

    def on_step_end(self, args, state, control, **kwargs):
        limit = self.curriculum.advance()
        due = self.curriculum.stage_step % int(args.eval_steps) == 0 and state.global_step >= args.eval_delay
        control.should_evaluate = limit or due
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        if self.curriculum.finished:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"
        return control


class ProgressCallback(TrainerCallback):
    """A progress bar with stage, loss and tokens/s; the log says at each promotion why."""

    def __init__(self, curriculum: Curriculum):
        self.curriculum, self.bar, self.loss = curriculum, None, None
        self.tokens, self.since = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.perf_counter()
        if state.is_world_process_zero:
            steps = self.curriculum.total_steps
            self.bar = progress(steps, "step", initial=state.global_step, disable=args.disable_tqdm)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is None:
            return
        now = time.perf_counter()
        speed = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        stage = (
            f"stage {self.curriculum.stage + 1}/{len(self.curriculum.stages)} (≤{self.curriculum.segments} segments)"
        )
        self.bar.set_description(stage)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s" + ("" if self.loss is None else f", loss {self.loss:.3f}"))
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)
        if state.is_world_process_zero and logs:
            of_the_method = () if model is None else model.get_base_model().log_values()
            keys = ("loss", "eval_loss", "eval_accuracy", "eval_segments", *NOTES, "learning_rate", *of_the_method)
            shown = [f"{key} {logs[key]:.4g}" for key in keys if key in logs]
            if shown:
                write = print if self.bar is None else self.bar.write  # above the bar
                write(f"step {state.global_step}: " + ", ".join(shown))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
