"""transformers' `Trainer` with a curriculum: one text length per global step, the same on every rank."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as HfProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from lrmt.adapters.adapter import save_adapter
from lrmt.arguments import TrainingArguments
from lrmt.errors import TrainingFault
from lrmt.files import replacing, to_json, write_whole
from lrmt.models.notes import Notes
from lrmt.tasks.base import Pieces, Task
from lrmt.training.callbacks import CurriculumCallback, ProgressCallback
from lrmt.training.checkpoint import FILES, POSITION_FILE, tensor_files
from lrmt.training.collate import collate
from lrmt.training.curriculum import Curriculum
from lrmt.training.hub import push_folder
from lrmt.training.notes import NotesMeter, collate_notes
from lrmt.training.ranks import check_same_calls, check_same_segments, gather_numbers
from lrmt.training.schedule import build_schedules


class Drawn(NamedTuple):
    """The micro-batches of a step and, of every rank, how often it runs its backbone on each, `calls[rank][micro-batch]`, and how many
    tokens of notes are scored in each, `notes[rank][micro-batch]`, where any are; `cut`, of every rank that has notes, whether one was cut.
    """

    step: int
    length: int
    micro_batches: list[dict[str, torch.Tensor]]
    calls: list[list[float]]
    notes: list[list[float]]
    cut: list[float]

    def numbers(self) -> list[float]:
        """What this rank tells the others."""
        return [*self.calls[0], *self.notes[0], *self.cut]

    def agreed(self, everyone: list[list[float]]) -> Drawn:
        """With the numbers of every rank."""
        n, k = len(self.calls[0]), len(self.notes[0])
        return self._replace(
            calls=[row[:n] for row in everyone],
            notes=[row[n : n + k] for row in everyone],
            cut=[number for row in everyone for number in row[n + k :]],
        )


class LongContextTrainer(Trainer):
    """Trains a `PeftModel(LongContextModel)` through the stages of a curriculum.

    A batch is drawn when it is needed, from (seed, step, rank), because a promotion may change its length; so resuming is
    exact, and the data loader merely counts.

    Args:
        train_task, eval_task: where samples come from; held-out accuracy on `eval_task` promotes.
        eval_samples: held-out samples per evaluation, over all ranks.
        stage_lr_decay: peak learning rate of a stage as a share of that of the stage before: longer texts build on what is
            there already, and a full step breaks it.
        notes_weight: of the memory's notes in the loss, for each stage (one number: for every stage); without any, none are made.
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
        notes_weight: Sequence[float] = (0.0,),
        identity: dict | None = None,
        callbacks=None,
    ):
        self.curriculum, self.train_task, self.eval_task = curriculum, train_task, eval_task
        self.eval_samples, self.identity = eval_samples, identity or {}
        self.notes_weight, self._pieces = curriculum.per_stage("notes_weight", notes_weight), Pieces(tokenizer)
        self._notes_cut, self._said_cut, self._told = False, False, NotesMeter()
        self.progress = ProgressCallback(curriculum)
        self._schedules = build_schedules(args, curriculum.max_steps, stage_lr_decay)
        self._losses: list[tuple[torch.Tensor, dict]] = []  # of the step so far, with the batches they are of
        self._ahead: Drawn | None = None
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
        self._losses, drawn, self._ahead = [], self._ahead, None
        if drawn is None or (drawn.step, drawn.length) != (
            step,
            self.curriculum.draw_length(step, self._segment_length),
        ):
            drawn = self._draw_step(step, num_batches)  # the first, or a promotion has changed the length
            drawn = drawn.agreed(gather_numbers(drawn.numbers(), self.args.device))
        check_same_calls(drawn.calls)
        if any(drawn.cut) and not self._said_cut:
            self._said_cut = True
            if self.is_world_process_zero():
                config = self.model.get_base_model().config
                print(
                    f"notes are cut to {config.note_length} tokens, which the memory has"
                    f"{' beside the one that `--memory_shift` takes' if getattr(config, 'memory_shift', False) else ''}; "
                    "`--num_memory_tokens` makes room for more"
                )
        self._note_shares = self._share_out(drawn, num_batches)
        self.progress.tokens += sum(b["input_ids"].numel() for b in drawn.micro_batches) * self.args.world_size
        return drawn.micro_batches, None

    def _share_out(self, drawn: Drawn, num_batches: int) -> list[float]:
        """What the mean loss of the notes of each of this rank's micro-batches weighs, so that their mean over ranks and micro-batches,
        which training takes, is that over the step's noted tokens, whoever has them. Notes that state passing adds are not counted.
        """
        scored = sum(map(sum, drawn.notes))
        if not scored:
            return [1.0] * num_batches
        return [num_batches * self.args.world_size * n / scored for n in drawn.notes[self.args.process_index]]

    def _draw_step(self, step: int, num_batches: int) -> Drawn:
        """The step's texts; its `calls` are those of this rank alone."""
        length = self.curriculum.draw_length(step, self._segment_length)
        micro_batches = []
        for micro in range(num_batches):
            number = (step * num_batches + micro) * self.args.world_size + self.args.process_index
            micro_batches.append(self._draw(self.train_task, number, self.args.per_device_train_batch_size, length))
        model = self.model.get_base_model()
        calls = [model.num_backbone_calls(**batch) for batch in micro_batches] if self.args.world_size > 1 else []
        notes = [model.num_notes(**batch) for batch in micro_batches if "notes" in batch]
        cut = [float(self._notes_cut)] * bool(notes)
        return Drawn(step, length, micro_batches, [calls], [notes], cut)

    @property
    def _segment_length(self) -> int:
        return self.model.get_base_model().config.segment_length

    def _draw(self, task: Task, number: int, batch_size: int, length: int) -> dict[str, torch.Tensor]:
        examples = [task.example(number * batch_size + i, length) for i in range(batch_size)]
        batch = collate(examples, self.processing_class.pad_token_id)
        if any(self.notes_weight):
            size = self.model.get_base_model().config.note_length
            batch["notes"], cut = collate_notes(examples, self._pieces, size)
            self._notes_cut |= cut
        return batch

    def _prepare_input(self, data):
        return data if isinstance(data, Notes) else super()._prepare_input(data)  # which the model moves

    # ------------------------------------------------------------------ steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if outputs.notes is not None:
            self._told.add(outputs.notes)
            share = self._note_shares[len(self._losses)] / max(1, outputs.notes.count)
            outputs.loss = outputs.loss + self._note_weight * share * outputs.notes.loss
        self._losses.append((outputs.loss.detach(), inputs))
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            self._check_step(model)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @property
    def _note_weight(self) -> float:
        return self.notes_weight[self.curriculum.stage]

    def _check_step(self, model):
        """The one collective of a step, before its gradients are used: whether every loss is finite, and the next step's calls.

        So the next step is drawn here, where there are ranks to agree with.
        """
        losses, batches = zip(*self._losses, strict=True)
        self._losses = []
        finite = torch.isfinite(torch.stack(losses)).tolist()
        ahead, numbers = None, []
        if self.args.world_size > 1 and self.is_in_train and self.state.global_step + 1 < self.state.max_steps:
            ahead = self._draw_step(self.state.global_step + 1, self.args.gradient_accumulation_steps)
            numbers = ahead.numbers()
        everyone = gather_numbers([*finite, *numbers], self.args.device)
        for number, batch in enumerate(batches):
            if not all(row[number] for row in everyone):
                self._explain_nan(model, batch, [row[number] for row in everyone])
        self._ahead = ahead and ahead.agreed([row[len(finite) :] for row in everyone])

    def _explain_nan(self, model, inputs, finite):
        """Every rank comes here together, so the extra forward keeps them in step."""
        with self.accelerator.autocast():
            where = self.model.get_base_model().find_fault(inputs["input_ids"], inputs["attention_mask"])
        segments = -(-inputs["input_ids"].shape[1] // self._segment_length)
        ranks = [rank for rank, ok in enumerate(finite) if not ok]
        raise TrainingFault(
            f"loss is not finite at step {self.state.global_step + 1} (stage {self.curriculum.stage + 1}, "
            f"{segments} segments, rank {ranks}): {where}; lower `--max_grad_norm` ({self.args.max_grad_norm}) and "
            f"resume from the last checkpoint, or lower `--learning_rate` ({self.args.learning_rate}) and begin with its weights, "
            "`--init_adapter_path`"
        )

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.model.get_base_model().log_values() | NotesMeter.values(self._told.numbers())
            self._told = NotesMeter()
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
        return self._schedules[self.curriculum.stage](self.curriculum.stage_step + 1)

    def _restart_schedule(self) -> None:
        """The scheduler has set the next learning rate already when a promotion moves that step to another stage."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._lr_factor()
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate and DeepSpeed wrap it
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what logs show

    # ------------------------------------------------------------------ held-out accuracy

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Exact-match accuracy on the stage's longest texts; under greedy decoding it is what generation would score. Where a stage ends
        in another, also on the longest texts of the stages before it: whether what was there is kept.
        """
        segments = self.curriculum.segments
        metrics = self._measure(segments, metric_key_prefix) | {f"{metric_key_prefix}_segments": segments}
        message = self.curriculum.report(metrics[f"{metric_key_prefix}_accuracy"]) if self.is_in_train else None
        if message and not self.curriculum.finished:
            shorter = sorted({n for n in self.curriculum.stages if n < segments})
            kept = {n: self._measure(n, metric_key_prefix)[f"{metric_key_prefix}_accuracy"] for n in shorter}
            metrics |= {f"{metric_key_prefix}_accuracy_{n}_segments": accuracy for n, accuracy in kept.items()}
            message += "".join(f"; {accuracy:.3f} at {n}" for n, accuracy in kept.items())
        self.log(metrics)
        if message:
            self._restart_schedule()
            if self.is_world_process_zero():
                print(f"\n{message}", flush=True)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, segments: int, prefix: str) -> dict[str, float]:
        """Accuracy, loss and notes on held-out texts of so many segments, of all ranks, each of which runs as many batches."""
        model = self.model_wrapped if self.is_in_train else self.model
        training = model.training
        model.eval()
        batch_size, world = self.args.per_device_eval_batch_size, self.args.world_size
        right, count, loss, told = 0.0, 0, 0.0, NotesMeter()
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
            if outputs.notes is not None:
                told.add(outputs.notes)
        model.train(training)
        mine = [right, count, loss, *(told.numbers() if any(self.notes_weight) else [])]
        right, count, loss, *told = map(sum, zip(*gather_numbers(mine, self.args.device), strict=True))
        return {f"{prefix}_accuracy": right / count, f"{prefix}_loss": loss / count} | NotesMeter.values(
            told, f"{prefix}_"
        )

    def _determine_best_metric(self, metrics, trial):
        """The best is one on texts of this length, shorter ones are easier; one to be loaded at the end is saved at once."""
        of_best = [
            e for e in self.state.log_history if e["step"] == self.state.best_global_step and "eval_segments" in e
        ]
        if of_best and of_best[-1]["eval_segments"] != metrics["eval_segments"]:
            self.state.best_metric = None
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir, self.processing_class, state_dict)

    def _save_checkpoint(self, model, trial):
        # old checkpoints go only when the new one is whole: a kill in between must leave one to resume from
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if kept := self.model.get_base_model().training_state():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / self._method_file) as temporary:
                save_file(kept, temporary)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            position = self.curriculum.state_dict() | {"identity": self.identity, FILES: tensor_files(folder)}
            write_whole(folder / POSITION_FILE, to_json(position))
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @property
    def _method_file(self) -> str:
        return f"method_{self.args.process_index}.safetensors"

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            if (kept := Path(resume_from_checkpoint, self._method_file)).is_file():
                self.model.get_base_model().load_training_state(load_file(kept))
            self.curriculum.load_state_dict(json.loads(Path(resume_from_checkpoint, POSITION_FILE).read_text()))
            if self.curriculum.finished:  # no step is left, though promotions left some of the limits unused
                state = json.loads(Path(resume_from_checkpoint, "trainer_state.json").read_text())
                self.args.max_steps = state["global_step"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ------------------------------------------------------------------ the Hub

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None  # opened before weights were loaded

    def create_model_card(self, **kwargs):
        """Leaves the card alone that was written with the adapter."""

    def push_to_hub(self, commit_message="End of training", **kwargs):
        """Uploads what lies in `output_dir`; `save_model` calls it with `--push_to_hub`."""
        if self.is_world_process_zero():
            push_folder(self.args, commit_message)


def exact_matches(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rows whose every scored token is the most likely one, `[B]` bool, from `logits [N, V]`, row by row, and `labels [B, T]`."""
    scored = labels[:, 1:] != -100
    row = scored.nonzero()[:, 0]
    wrong = (logits.argmax(-1) != labels[:, 1:][scored]).long()
    return torch.zeros(len(labels), dtype=torch.long, device=labels.device).index_add(0, row, wrong) == 0
