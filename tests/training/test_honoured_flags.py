"""Every flag of transformers and TRL that a recipe accepts does what it says, or is refused in one line."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers import TrainingArguments as HfTrainingArguments
from trl import ModelConfig

from lrmt import unsupported
from lrmt.arguments import ModelArguments, TrainingArguments
from lrmt.errors import TrainingFault, UsageError
from lrmt.training import trainer as module
from lrmt.training.schedule import build_schedule, build_schedules, check_optimizer

#: flags of transformers' `TrainingArguments` that do what they say: looked at one by one, and tried where in doubt
HONOURED = """
    output_dir resume_from_checkpoint seed full_determinism use_cpu do_train do_eval local_rank
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps dataloader_pin_memory
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_grad_norm neftune_noise_alpha
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    bf16 fp16 tf32 torch_empty_cache_steps
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit save_only_model save_on_each_node
    load_best_model_at_end metric_for_best_model greater_is_better
    push_to_hub hub_strategy hub_token hub_private_repo hub_model_id hub_revision
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed
"""
HONOURED_OF_MODEL = """
    model_name_or_path model_revision dtype attn_implementation load_in_8bit load_in_4bit bnb_4bit_quant_type
    use_bnb_nested_quant bnb_4bit_quant_storage use_peft lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora
"""


@pytest.mark.parametrize(
    ("arguments", "honoured", "refused"),
    [
        (HfTrainingArguments, HONOURED, unsupported.TRAINING),
        (ModelConfig, HONOURED_OF_MODEL, unsupported.MODEL),
    ],
    ids=["TrainingArguments", "ModelConfig"],
)
def test_every_flag_is_honoured_or_refused(arguments, honoured, refused):
    """A new version with a new flag fails here: look what it does, and put it into one of the two lists."""
    there, honoured, refused = {field.name for field in dataclasses.fields(arguments)}, {*honoured.split()}, {*refused}
    assert there <= honoured | refused, sorted(there - honoured - refused)
    assert not honoured & refused
    assert (honoured | refused) - there <= {"trust_remote_code"}  # which other versions have


def test_flags_with_some_refused_values_are_honoured_else():
    assert {*unsupported.HONOURED_VALUES, *unsupported.REFUSED_VALUES} <= {*HONOURED.split()}


def another(field, default):
    """A value that is not the default."""
    return {bool: not default, int: 7, float: 0.5, list: ["x"]}.get(type(default), "x")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(TrainingArguments, name) for name in unsupported.TRAINING]
    + [(ModelArguments, name) for name in unsupported.MODEL if name in ModelConfig.__dataclass_fields__],
)
def test_a_flag_without_effect_is_refused(arguments, name):
    field = arguments.__dataclass_fields__[name]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = another(field, default)
    with pytest.raises(UsageError) as caught:
        arguments(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"`--{name}` is not supported; got {value}. ") and "\n" not in message
    arguments(**{name: default})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--max_steps 100", "`--max_steps` is not supported; got 100. .*`--stage_max_steps`"),
        ("--num_train_epochs 1", "`--num_train_epochs` .* got 1.0. .*`--stage_max_steps`"),
        ("--label_smoothing_factor 0.1", "`--label_smoothing_factor` .* got 0.1. .*leave it out"),
        ("--lora_modules_to_save embed_tokens", "`--lora_modules_to_save` .*embed_tokens.*leave it out"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "`--lr_scheduler_type` reduce_lr_on_plateau .*choose linear"),
        ("--lr_scheduler_type greedy", "`--lr_scheduler_type` greedy .*choose linear"),
        ("--eval_strategy no", "`--eval_strategy` no .*`--eval_steps`"),
        ("--eval_strategy epoch", "`--eval_strategy` epoch .*`--eval_steps`"),
        ("--hub_strategy every_save", "`--hub_strategy` every_save .*leave it out"),
        ("--metric_for_best_model f1", "`--metric_for_best_model` f1 .*loss or accuracy"),
        ("--optim galore_adamw_layerwise", "`--optim` galore_adamw_layerwise .*choose adamw_torch"),
        ("--optim schedule_free_adamw", "`--optim` schedule_free_adamw .*choose adamw_torch"),
        ("--train_sampling_strategy group_by_length", "`--train_sampling_strategy` .*leave it out"),
        ("--trust_remote_code true", "`--trust_remote_code`"),
        ("--use_cpu true --activation_checkpointing_kwargs {\"offload\":true}", "offload .*leave it out"),
        # found before weights are loaded
        ("--optim adamw_torch_4bit", "`--optim` adamw_torch_4bit .*torchao"),
        ("--lr_scheduler_type warmup_stable_decay", "`--lr_scheduler_kwargs` {} .*num_decay_steps"),
        ("--lr_scheduler_type linear --lr_scheduler_kwargs {\"min_lr\":1}", "`--lr_scheduler_kwargs` .*'min_lr'"),
        ("--lr_scheduler_type constant --lr_scheduler_kwargs {\"min_lr\":1}", "takes none: leave them out"),
        ("--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {\"min_lr\":1}", "min_lr exceeds 0.003"),
        ("--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {\"num_decay_steps\":5}", "more than the 4 of a stage"),
        ("--report_to wandb", "`--report_to` wandb: .*wandb"),
        ("--report_to wandbs", "`--report_to` wandbs: .*wandb"),
        ("--output_dir /proc/nowhere/run", "`--output_dir` /proc/nowhere/run cannot be written .*name another"),
    ],
)  # fmt: skip
def test_refused_before_weights_are_loaded(train_small, tmp_path, monkeypatch, flags, expected):
    for name in ("wandb", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    monkeypatch.setattr("lrmt.training.run.build_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=expected) as caught:
        train_small("--output_dir", tmp_path / "run", *flags.split())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_an_old_runs_file_is_still_a_config(train_small, tmp_path):
    """With values that transformers had filled in."""
    filled = "debug: []\ndo_eval: true\ndataloader_pin_memory: false\nactivation_checkpointing: false\nreport_to: []\n"
    (tmp_path / "old.yaml").write_text(Path(__file__).parents[1].joinpath("small.yaml").read_text() + filled)
    assert train_small("--config", tmp_path / "old.yaml", "--dry_run", "true") is None


# ---------------------------------------------------------------------- learning rates


def arguments(**settings):
    return TrainingArguments(learning_rate=1e-3, warmup_steps=settings.pop("warmup_steps", 0), **settings)


def test_floors_are_of_the_learning_rate_itself():
    flags = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-4"}}  # as YAML reads it
    first, second = build_schedules(arguments(**flags), [10, 20], 0.5)
    assert [1e-3 * first(step) for step in (0, 5, 10)] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    assert [1e-3 * second(step) for step in (0, 20)] == pytest.approx([5e-4, 1e-4])
    flags = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert 1e-3 * build_schedule(arguments(**flags), 10, 0.5)(10) == pytest.approx(5e-5)
    flags = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 2e-4}}
    assert 1e-3 * build_schedule(arguments(**flags), 10)(11) == pytest.approx(2e-4)


def test_stable_and_decay_fill_each_stage():
    flags = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "linear"},
    }
    rates = build_schedule(arguments(**flags, warmup_steps=2), 8)
    assert [rates(step) for step in range(9)] == [0, 0.5, 1, 1, 1, 1, 1, 0.5, 0]


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_restarts"]
)
def test_schedules_do_not_depend_on_the_rate(name):
    one, other = (build_schedule(arguments(lr_scheduler_type=name, warmup_steps=3), 12, peak) for peak in (1.0, 0.25))
    assert [other(step) for step in range(13)] == [0.25 * one(step) for step in range(13)]


def test_schedules_are_built_once_for_each_stage(train_small, fp32_flags, monkeypatch):
    from lrmt.training import schedule

    built = []
    get_scheduler = schedule.get_scheduler
    monkeypatch.setattr(schedule, "get_scheduler", lambda *args: built.append(args[3]) or get_scheduler(*args))
    train_small(*fp32_flags, "--stage_max_steps", "2", "3")
    assert built == [2, 3] * 2  # to check them, and to train


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "paged_adamw_8bit", "lion_32bit"]
)
def test_optimizers_that_run_here_are_taken(name):
    check_optimizer(arguments(optim=name))


# ---------------------------------------------------------------------- the best model, and what is saved


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def steps_saved(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


@pytest.fixture
def scores(monkeypatch):
    """`scores(…)`: the held-out accuracies, in quarters, of the evaluations to come."""

    def script(*quarters):
        left = iter(quarters)
        monkeypatch.setattr(
            module, "exact_matches", lambda logits, labels: torch.arange(len(labels)) < next(left)
        )  # of 4 samples

    return script


BEST = [
    "--load_best_model_at_end",
    "true",
    "--metric_for_best_model",
    "accuracy",
    "--stage_max_steps",
    "2",
    "3",
    "--eval_steps",
    "1",
]


@pytest.mark.parametrize("saving", ["--save_steps 5", "--save_strategy best"])
def test_the_best_model_of_the_last_stage_is_kept(train_small, fp32_flags, scores, saving):
    """Shorter texts are easier: the best of the first stage is none of the whole run. Nor is it rotated away."""
    scores(3, 3, 1, 2, 1)
    trainer = train_small(*fp32_flags, *BEST, *saving.split(), "--save_total_limit", "1")
    folder = Path(trainer.args.output_dir)
    assert trainer.state.global_step == 5 and 4 in steps_saved(folder)
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-4")
    kept, best = weights(folder), weights(folder / "checkpoint-4")
    assert kept.keys() == best.keys() and all(torch.equal(kept[name], best[name]) for name in best)
    logged = {name: p for name, p in trainer.model.named_parameters() if "memory_embedding.modules_to_save" in name}
    assert torch.equal(*logged.values(), best["base_model.model.memory_embedding.weight"])


def test_the_best_model_is_found_again_after_a_resume(train_small, fp32_flags, scores, tmp_path):
    flags = [*fp32_flags, *BEST, "--save_steps", "1", "--save_total_limit", "9", "--output_dir", tmp_path / "run"]
    scores(3, 3, 2, 1, 1)
    train_small(*flags)
    for step in (4, 5):
        (tmp_path / "run" / f"checkpoint-{step}" / "curriculum.json").unlink()
    scores(1, 1)
    trainer = train_small(*flags, "--resume_from_checkpoint", "true")
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-3")
    kept, best = weights(tmp_path / "run"), weights(tmp_path / "run" / "checkpoint-3")
    assert all(torch.equal(kept[name], best[name]) for name in best)


def test_nothing_is_saved_on_the_way_without_a_strategy(train_small, fp32_flags):
    trainer = train_small(*fp32_flags, "--save_strategy", "no", "--save_steps", "1", "--stage_max_steps", "2")
    assert steps_saved(trainer.args.output_dir) == [] and weights(trainer.args.output_dir)


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(train_small, fp32_flags, tmp_path):
    flags = [*fp32_flags, "--save_only_model", "true", "--stage_max_steps", "2", "--save_steps", "1"]
    train_small(*flags, "--output_dir", tmp_path / "run")
    for name in ("true", tmp_path / "run" / "checkpoint-3"):
        with pytest.raises(UsageError, match="without its optimizer.*`--init_adapter_path`"):
            train_small(*flags, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", name)
    train_small(*flags, "--output_dir", tmp_path / "on", "--init_adapter_path", tmp_path / "run" / "checkpoint-3")


def test_evaluation_waits_for_its_delay(train_small, fp32_flags, scores):
    scores(*[0] * 9)
    trainer = train_small(*fp32_flags, "--stage_max_steps", "3", "--eval_steps", "1", "--eval_delay", "5")
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert evaluated == [3, 5, 6]  # stages end with one all the same


def test_noisy_embeddings_reach_training_only(train_small, fp32_flags):
    def logged(*flags):
        trainer = train_small(*fp32_flags, "--learning_rate", "0", "--stage_max_steps", "1", *flags)
        return [[e[key] for e in trainer.state.log_history if key in e] for key in ("loss", "eval_loss")]

    (loss, held_out), (noisy_loss, noisy_held_out) = logged(), logged("--neftune_noise_alpha", "10")
    assert loss != noisy_loss and held_out == noisy_held_out


# ---------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch):
    """What would be sent: `("create_repo" | "create_branch" | "upload_folder", arguments)`."""
    import huggingface_hub
    from huggingface_hub import HfApi

    sent = []
    repo = huggingface_hub.RepoUrl("https://huggingface.co/me/run")

    def note(what, result=None):
        def call(self, *args, **kwargs):
            if what == "upload_folder":
                folder, ignored = Path(kwargs["folder_path"]), kwargs.get("ignore_patterns")
                names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
                kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignored)
                kwargs["files"] = {name: (folder / name).read_bytes() for name in kept}
            sent.append((what, args, kwargs))
            return result

        return call

    monkeypatch.setattr(HfApi, "create_repo", note("create_repo", repo))
    monkeypatch.setattr(HfApi, "create_branch", note("create_branch"))
    monkeypatch.setattr(HfApi, "upload_folder", note("upload_folder"))
    return sent


def test_the_folder_is_pushed_once_as_it_is(train_small, fp32_flags, tmp_path, hub):
    flags = ["--push_to_hub", "true", "--hub_model_id", "run", "--hub_revision", "dev", "--hub_private_repo", "true"]
    folder = tmp_path / "run"
    train_small(*fp32_flags, *flags, "--stage_max_steps", "2", "--save_steps", "1", "--output_dir", folder)
    assert [what for what, *_ in hub] == ["create_repo", "create_branch", "upload_folder"]
    assert hub[0][1] == ("run",) and hub[0][2]["private"] is True
    upload = hub[2][2]
    assert (upload["repo_id"], upload["revision"]) == ("me/run", "dev")
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert upload["files"] == there  # no checkpoints, no optimizer states, no arguments in a pickle
    assert {"README.md", "adapter_model.safetensors", "config.json", "tokenizer.json"} <= set(there)
    assert steps_saved(folder) and b"lrmt.load" in there["README.md"] and b"Trainer" not in there["README.md"]


def test_a_closed_hub_is_found_before_weights_are_loaded(train_small, fp32_flags, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, *args, **kwargs):
        raise OSError("401 Client Error")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr("lrmt.training.run.build_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match="`--push_to_hub` to run: 401 Client Error; log in .*`--hub_model_id`"):
        train_small(*fp32_flags, "--push_to_hub", "true", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_leaves_the_adapter(train_small, fp32_flags, tmp_path, hub, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, *args, **kwargs):
        raise OSError("connection lost")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(TrainingFault, match="connection lost; the adapter is in .* `hf upload me/run "):
        train_small(*fp32_flags, "--push_to_hub", "true", "--stage_max_steps", "1", "--output_dir", tmp_path / "run")
    assert weights(tmp_path / "run")


# ---------------------------------------------------------------------- what a log holds


def test_a_log_in_a_file_has_few_lines(train_small, fp32_flags, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    flags = ["--disable_tqdm", "false", "--stage_max_steps", "20", "--logging_steps", "1000"]
    train_small(*fp32_flags, *flags, "--curriculum_stages", "1")
    out, err = capfd.readouterr()
    assert "\r" not in out + err and "Loading weights" not in err
    steps = [line for line in err.splitlines() if " step [" in line]
    assert len(steps) == 1 and "20/20" in steps[0]  # half a minute has not gone by


# ---------------------------------------------------------------------- what ranks agree on


@pytest.fixture
def two_ranks(monkeypatch):
    """Another rank, which says the same, or what `answer` makes of it; `two_ranks.sizes` are how much is said each time."""
    from lrmt.training import ranks

    class Ranks:
        sizes = []
        answer = staticmethod(lambda numbers: numbers)

    state = Ranks()
    state.sizes = []

    def gather(numbers, device):
        numbers = [float(number) for number in numbers]
        state.sizes.append(len(numbers))
        return [numbers, state.answer(list(numbers))]

    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(ranks, "gather_numbers", gather)
    monkeypatch.setattr(module, "gather_numbers", gather)
    return state


THREE = ["--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "1", "--vary_lengths", "false"]


def test_a_step_takes_one_collective(train_small, fp32_flags, two_ranks):
    train_small(*fp32_flags, *THREE, "--stage_max_steps", "4")
    first, step, last, evaluation = [3], [3 + 3], [3], [1, 3]  # 3 losses and 3 counts of the next step
    stage = 3 * step
    assert two_ranks.sizes == first + stage + step + evaluation + first + stage + last + evaluation


@pytest.mark.parametrize("number", [0, 1, 3], ids=["the first step", "the second", "one after a promotion"])
def test_ranks_that_disagree_stop_before_the_forward(train_small, fp32_flags, two_ranks, monkeypatch, number):
    """`number` of collectives before the one in which the other rank has more to run; a promotion comes after step 1."""
    forwards = []
    compute_loss = module.LongContextTrainer.compute_loss
    monkeypatch.setattr(
        module.LongContextTrainer,
        "compute_loss",
        lambda self, *args, **kwargs: forwards.append(self.state.global_step) or compute_loss(self, *args, **kwargs),
    )

    def answer(numbers):
        if len(two_ranks.sizes) == (1, 2, 5)[(0, 1, 3).index(number)]:
            numbers[-1] += 1
        return numbers

    two_ranks.answer = answer
    stages = ["1", "4"] if number == 3 else ["4", "4"]
    with pytest.raises(TrainingFault, match=r"different numbers of segments \(rank 0: \d, rank 1: \d\)"):
        train_small(*fp32_flags, *THREE, "--stage_max_steps", *stages)
    assert max(forwards, default=-1) == {0: -1, 1: 0, 3: 0}[number]


def test_a_loss_that_is_not_finite_ends_the_step_before_the_optimizer(train_small, fp32_flags, two_ranks, monkeypatch):
    """In one of a step's micro-batches, and on the other rank alone."""
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or step(self, *args))

    def answer(numbers):
        if len(two_ranks.sizes) == 3:
            numbers[1] = 0.0  # the second micro-batch of the second step
        return numbers

    two_ranks.answer = answer
    explained = []
    find_fault = "lrmt.models.recurrent.RecurrentModel.find_fault"
    monkeypatch.setattr(find_fault, lambda self, ids, mask: explained.append(ids) or "it breaks somewhere")
    with pytest.raises(TrainingFault, match=r"at step 2 \(stage 1, 1 segments, rank \[1\]\): it breaks somewhere;"):
        train_small(*fp32_flags, *THREE, "--stage_max_steps", "4")
    assert len(steps) == 1 + 1 and len(explained) == 1  # the first step's, and the trial of the optimizer


def test_a_broken_micro_batch_is_found_among_several(train_small, fp32_flags, monkeypatch):
    class Poison(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.get_base_model().memory_embedding.modules_to_save.default.weight[0, 0] = torch.nan

    begin = module.LongContextTrainer.__init__
    monkeypatch.setattr(
        module.LongContextTrainer, "__init__", lambda self, *a, **k: begin(self, *a, callbacks=[Poison()], **k)
    )
    with pytest.raises(
        TrainingFault, match=r"at step 2 \(stage 1, 1 segments, rank \[0\]\): it breaks in the last segment"
    ):
        train_small(*fp32_flags, *THREE)


def test_a_landmark_models_fault_names_its_segment(run_recipe, backbones, tmp_path, monkeypatch):
    small = "--block_length 16 --context_length 100 --top_k 2 --num_digits 2 --stage_max_steps 2 --eval_samples 4 --vary_lengths false"
    flags = [*small.split(), "--curriculum_stages", "2", "--model_name_or_path", backbones["llama"], "--lora_r", "4"]
    draw = module.LongContextTrainer._draw

    def spoilt(self, task, number, rows, length):
        batch = draw(self, task, number, rows, length)
        token = int(self.processing_class("~", add_special_tokens=False)["input_ids"][-1])
        batch["input_ids"][0, 150] = token  # in the second of two contexts
        with torch.no_grad():
            self.model.get_input_embeddings().weight[token] = torch.nan
        return batch

    monkeypatch.setattr(module.LongContextTrainer, "_draw", spoilt)
    with pytest.raises(TrainingFault, match=r"stage 1, 2 segments, rank \[0\]\): .*segment 2"):
        run_recipe("landmark_llama", *flags, "--output_dir", tmp_path / "run")


def test_settings_come_as_a_dict_too(train_small, fp32_flags, tmp_path):
    """The identity of a checkpoint has the keys that it always had."""
    trainer = train_small(*fp32_flags, "--stage_max_steps", "1", "--output_dir", tmp_path / "run")
    position = json.loads((tmp_path / "run" / "checkpoint-2" / "curriculum.json").read_text())
    assert position["identity"] == trainer.identity
    ours = {"num_memory_tokens", "segment_length", "bptt_segments", "segment_alignment", "memory_noise"}
    assert ours <= set(trainer.identity) and not {"checkpoint_segments"} & set(trainer.identity)
