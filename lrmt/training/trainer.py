"""transformers' `Trainer` with a curriculum: one text length per global step, the same on every rank."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as HfProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from lrmt.adapters.adapter import save_adapter
from lrmt.adapters.backbone import keep_4bit_trainable
from lrmt.arguments import TrainingArguments
from lrmt.errors import TrainingFault
from lrmt.tasks.base import Task
from lrmt.training.callbacks import CurriculumCallback, ProgressCallback
from lrmt.training.checkpoint import POSITION_FILE
from lrmt.training.collate import collate
from lrmt.training.curriculum import Curriculum
from lrmt.training.ranks import check_same_segments, gather_numbers


class LongContextTrainer(Trainer):
    """Trains a `PeftModel(LongContextModel)` through the stages of a curriculum.

    A batch is drawn when it is needed, from (seed, step, rank), because a promotion may change its length; so resuming is
    exact, and the data loader merely counts.

    Args:
        train_task, eval_task: where samples come from; held-out accuracy on `eval_task` promotes.
        eval_samples: held-out samples per evaluation, over all ranks.
        stage_lr_decay: peak learning rate of a stage as a share of that of the stage before: longer texts build on what is
            there already, and a full step breaks it.
        identity: settings that a resumed run must share, kept in each checkpoint.
    """

    def __init__(
        self,
        model,
        args: TrainingArguments,
        *,
        curriculum: Curriculum,
        train_task: Task,
        eval_task: Task,
        tokenizer,
        eval_samples: int = 64,
        stage_lr_decay: float = 1.0,
        identity: dict | None = None,
        callbacks=None,
    ):
        self.curriculum, self.train_task, self.eval_task = curriculum, train_task, eval_task
        self.eval_samples, self.stage_lr_decay, self.identity = eval_samples, stage_lr_decay, identity or {}
        self.progress = ProgressCallback(curriculum)
        args.max_steps = curriculum.total_steps
        args.remove_unused_columns = False
        args.ignore_data_skip = True  # batches are drawn by step: a resumed run has none to skip
        super().__init__(
            model,
            args,
            train_dataset=range(args.max_steps),
            eval_dataset=range(eval_samples),
            processing_class=tokenizer,
            callbacks=[CurriculumCallback(curriculum), self.progress, *(callbacks or [])],
        )
        for callback in (HfProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        # our forward takes **kwargs, from which the Trainer concludes that it divides by `num_items_in_batch`: it does not
        self.model_accepts_loss_kwargs = False

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        # its own generator: a loader draws a seed from the global one, which a resumed run has just restored
        return DataLoader(range(count), batch_size=None, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        for _ in range(num_batches):
            next(epoch_iterator)
        step = self.state.global_step
        self.model.get_base_model().on_progress(self.curriculum.progress)
        length = self.curriculum.draw_length(step, self._segment_length)
        micro_batches = []
        for micro in range(num_batches):
            number = (step * num_batches + micro) * self.args.world_size + self.args.process_index
            micro_batches.append(self._draw(self.train_task, number, self.args.per_device_train_batch_size, length))
        self.progress.tokens += sum(b["input_ids"].numel() for b in micro_batches) * self.args.world_size
        return micro_batches, None

    @property
    def _segment_length(self) -> int:
        return self.model.get_base_model().config.segment_length

    def _draw(self, task: Task, number: int, batch_size: int, length: int) -> dict[str, torch.Tensor]:
        examples = [task.example(number * batch_size + i, length) for i in range(batch_size)]
        return collate(examples, self.processing_class.pad_token_id)

    # ------------------------------------------------------------------ steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.world_size > 1:
            check_same_segments(self.model.get_base_model().num_backbone_calls(**inputs), self.args.device)
        outputs = model(**inputs)
        finite = gather_numbers(float(torch.isfinite(outputs.loss.detach())), self.args.device)
        if not all(finite):
            self._explain_nan(model, inputs, finite)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _explain_nan(self, model, inputs, finite):
        """Every rank comes here together, so the extra forward keeps them in step."""
        with self.accelerator.autocast():
            norms = self.model.get_base_model().memory_norms(inputs["input_ids"], inputs["attention_mask"])
        segments = len(norms) + 1  # the last one writes no memory
        bad = next((s for s, norm in enumerate(norms) if not math.isfinite(norm)), None)
        where = (
            f"memory first breaks in segment {bad + 1}"
            if bad is not None
            else f"it breaks in the last segment, {segments}"
        )
        ranks = [rank for rank, ok in enumerate(finite) if not ok]
        raise TrainingFault(
            f"loss is not finite at step {self.state.global_step + 1} (stage {self.curriculum.stage + 1}, "
            f"{segments} segments, rank {ranks}): {where}; lower `--learning_rate` ({self.args.learning_rate}) or "
            f"`--max_grad_norm` ({self.args.max_grad_norm}) and resume from the last checkpoint"
        )

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.model.get_base_model().log_values()
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """`--lr_scheduler_type` with its warm-up, begun anew in each stage."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                self.optimizer if optimizer is None else optimizer, lambda _: self._lr_factor()
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _lr_factor(self) -> float:
        """What the learning rate of the stage's next step is multiplied by; its first two steps share one, above 0."""
        limit, warmup = self.curriculum.max_steps[self.curriculum.stage], self.args.warmup_steps
        warmup = math.ceil(warmup * limit) if warmup < 1 else int(warmup)
        dummy = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        schedule = get_scheduler(self.args.lr_scheduler_type, dummy, warmup, limit, self.args.lr_scheduler_kwargs)
        peak = self.stage_lr_decay**self.curriculum.stage
        return peak * schedule.lr_lambdas[0](self.curriculum.stage_step + 1)

    def _restart_schedule(self) -> None:
        """The scheduler has set the next learning rate already when a promotion moves that step to another stage."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._lr_factor()
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate and DeepSpeed wrap it
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what logs show

    # ------------------------------------------------------------------ held-out accuracy

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Exact-match accuracy on the stage's longest texts; under greedy decoding it is what generation would score.

        Every rank runs the same number of batches.
        """
        model = self.model_wrapped if self.is_in_train else self.model
        training, segments = model.training, self.curriculum.segments
        model.eval()
        keep_4bit_trainable(model)
        batch_size, world = self.args.per_device_eval_batch_size, self.args.world_size
        right, count, loss = 0.0, 0, 0.0
        for batch in range(math.ceil(self.eval_samples / (batch_size * world))):
            number = batch * world + self.args.process_index
            inputs = self._prepare_inputs(
                self._draw(self.eval_task, number, batch_size, segments * self._segment_length)
            )
            if world > 1:
                check_same_segments(self.model.get_base_model().num_backbone_calls(**inputs), self.args.device)
            outputs = model(**inputs)
            right += int(exact_matches(outputs.logits, inputs["labels"]).sum())
            loss += float(outputs.loss) * batch_size
            count += batch_size
        model.train(training)
        right, count, loss = (sum(gather_numbers(n, self.args.device)) for n in (right, count, loss))
        metrics = {
            f"{metric_key_prefix}_accuracy": right / count,
            f"{metric_key_prefix}_loss": loss / count,
            f"{metric_key_prefix}_segments": segments,
        }
        self.log(metrics)
        if self.is_in_train and (message := self.curriculum.report(right / count)):
            self._restart_schedule()
            if self.is_world_process_zero():
                print(f"\n{message}", flush=True)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir, self.processing_class, state_dict)

    def _save_checkpoint(self, model, trial):
        # old checkpoints go only when the new one is whole: a kill in between must leave one to resume from
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", POSITION_FILE)
            temporary = path.with_suffix(".tmp")
            position = self.curriculum.state_dict() | {"identity": self.identity}
            temporary.write_text(json.dumps(position, indent=2))
            os.replace(temporary, path)
            rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=limit, use_mtime=True)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            self.curriculum.load_state_dict(json.loads(Path(resume_from_checkpoint, POSITION_FILE).read_text()))
            if self.curriculum.finished:  # no step is left, though promotions left some of the limits unused
                state = json.loads(Path(resume_from_checkpoint, "trainer_state.json").read_text())
                self.args.max_steps = state["global_step"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def exact_matches(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rows whose every scored token is the most likely one, `[B]` bool, from `logits [N, V]`, row by row, and `labels [B, T]`."""
    scored = labels[:, 1:] != -100
    row = scored.nonzero()[:, 0]
    wrong = (logits.argmax(-1) != labels[:, 1:][scored]).long()
    return torch.zeros(len(labels), dtype=torch.long, device=labels.device).index_add(0, row, wrong) == 0
