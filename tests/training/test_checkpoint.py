"""Adapters on disk: audited, small, without a trace of this machine, and opened as they were trained."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lrmt
from lrmt.adapters.adapter import audit_adapter, save_adapter
from lrmt.errors import UsageError
from lrmt.training.checkpoint import find_checkpoint

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def ids(rows=2, length=150):
    return torch.randint(10, 900, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def gap(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_adapter_holds_lora_and_memory_and_is_small(trained):
    trainer, folder = trained
    assert {p.name for p in folder.iterdir() if p.is_file()} >= FILES
    weights = weights_of(folder)
    names = [f"backbone.model.layers.{i}.self_attn.{p}_proj.lora_{x}" for i in range(2) for p in "qkvo" for x in "AB"]
    names += [
        f"backbone.model.layers.{i}.mlp.{p}_proj.lora_{x}"
        for i in range(2)
        for p in ("gate", "up", "down")
        for x in "AB"
    ]
    assert set(weights) == {f"base_model.model.{name}.weight" for name in [*names, "memory_embedding"]}
    assert weights["base_model.model.memory_embedding.weight"].shape == (4, 64)
    elements = sum(t.numel() for t in weights.values())
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * elements + 8192
    assert elements == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_checkpoints_hold_no_frozen_weights(trained):
    _, folder = trained
    for checkpoint in folder.glob("checkpoint-*"):
        assert not (checkpoint / "model.safetensors").exists()
        assert (checkpoint / "optimizer.pt").stat().st_size < 3 * (folder / "adapter_model.safetensors").stat().st_size
        assert (checkpoint / "curriculum.json").is_file()


def test_loads_with_the_logits_it_was_trained_to(trained):
    trainer, folder = trained
    model = lrmt.load(folder, dtype="bfloat16")  # also where a CPU would rather compute in fp32
    assert isinstance(model, PeftModel) and not model.training
    with trainer.compute_loss_context_manager():
        want = logits(trainer.model)
        got = logits(model)
    trainer.model.train()
    assert model.get_base_model().config.backbone_quantization == "nf4"
    assert gap(got, want) < 0.02  # bf16: autocast keeps the residual stream in fp32, a loaded model does not
    with torch.no_grad(), model.disable_adapter():
        assert gap(logits(model), want) > 0.1  # training did move it


@pytest.mark.parametrize("in_4bit", ["true", "false"])
def test_fp32_round_trip_is_exact(train_small, fp32_flags, in_4bit):
    flags = ["--load_in_4bit", in_4bit, "--learning_rate", "1e-2", "--stage_max_steps", "2"]
    trainer = train_small(*fp32_flags, *flags)
    model = lrmt.load(trainer.args.output_dir)
    assert model.get_base_model().backbone.dtype == torch.float32
    assert torch.equal(logits(model), logits(trainer.model))


def test_memory_alone_round_trip(train_small, fp32_flags):
    trainer = train_small(*fp32_flags, "--use_peft", "false", "--learning_rate", "1e-2", "--stage_max_steps", "2")
    folder = Path(trainer.args.output_dir)
    assert set(weights_of(folder)) == {"base_model.model.memory_embedding.weight"}
    assert torch.equal(logits(lrmt.load(folder)), logits(trainer.model))


def test_nothing_is_looked_up_on_the_network(trained, tmp_path, monkeypatch):
    trainer, folder = trained

    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    save_adapter(trainer.model, tmp_path / "adapter", trainer.processing_class)
    lrmt.load(tmp_path / "adapter")


def test_card_and_configs_name_no_place_of_this_machine(trained, tmp_path):
    trainer, _ = trained
    config = trainer.model.get_base_model().config
    name = config.backbone_name
    save_adapter(trainer.model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model" not in card and str(Path(name).parent) not in card and str(Path.home()) not in card
    assert f"`{Path(name).name}`" in card and "lrmt.load" in card
    try:
        config.backbone_name = "organisation/model"
        save_adapter(trainer.model, tmp_path / "adapter")
        assert "base_model: organisation/model\n" in (tmp_path / "adapter" / "README.md").read_text()
    finally:
        config.backbone_name = name


def test_shipped_backbones_leave_no_path_at_all(run_recipe, small_flags, fp32_flags, tmp_path):
    one_step = [
        "--curriculum_stages",
        "1",
        "--stage_max_steps",
        "1",
        "--per_device_train_batch_size",
        "1",
        "--eval_samples",
        "1",
    ]
    flags = [*small_flags, *fp32_flags, *one_step, "--output_dir", tmp_path / "run"]
    run_recipe("rmt_llama", "--model_name_or_path", "tiny-llama", *flags)
    for path in [*(tmp_path / "run").glob("*.json"), tmp_path / "run" / "README.md"]:
        assert str(Path(lrmt.__file__).parent) not in path.read_text(), path.name
    lrmt.load(tmp_path / "run")


# ---------------------------------------------------------------------- audit


def spoil(folder, change):
    weights = weights_of(folder)
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


MEMORY = "base_model.model.memory_embedding.weight"
LORA = "base_model.model.backbone.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({LORA: torch.zeros(0)}), "q_proj.lora_A.weight is empty, of shape .0."),
        (lambda w: w[LORA].view(-1)[:1].fill_(torch.nan), "q_proj.lora_A.weight is not finite"),
        (lambda w: w[MEMORY].view(-1)[:1].fill_(torch.inf), "memory_embedding.weight is not finite"),
        (lambda w: w.pop(MEMORY), "memory_embedding.* is missing"),
        (lambda w: w.pop(LORA), "q_proj.lora_A.weight is missing"),
    ],
)
def test_audit_fails(trained, tmp_path, change, message):
    trainer, _ = trained
    save_adapter(trainer.model, tmp_path)
    names = list(weights_of(tmp_path))
    audit_adapter(tmp_path, names)
    spoil(tmp_path, change)
    with pytest.raises(RuntimeError, match=message):
        audit_adapter(tmp_path, names)


@pytest.mark.parametrize("broken", [{}, {MEMORY: torch.zeros(0)}, {MEMORY: torch.full([4, 64], torch.nan)}])
def test_a_bad_save_leaves_the_last_good_one(trained, tmp_path, broken):
    """What ZeRO-3 gives a rank that did not gather: nothing, empty tensors."""
    trainer, _ = trained
    save_adapter(trainer.model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    state = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    state[next(n for n in state if "memory" in n)] = broken.get(MEMORY, torch.zeros(4, 64))
    if not broken:
        state.pop(next(n for n in state if "lora_A" in n))
    with pytest.raises(RuntimeError, match="missing|empty|finite"):
        save_adapter(trainer.model, tmp_path, state_dict=state)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------- opening


def test_another_backbone_is_refused(trained, backbones):
    _, folder = trained
    with pytest.raises(UsageError, match="another backbone .*than .*mistral"):
        lrmt.load(folder, model_name_or_path=str(backbones["mistral"]))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "config.json"])
def test_half_an_adapter_is_refused(trained, tmp_path, name):
    trainer, _ = trained
    save_adapter(trainer.model, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="--adapter_path"):
        lrmt.load(tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=f"not a whole adapter, {name} missing"):
        lrmt.load(tmp_path)


PARTS = [
    "curriculum.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("cut", [True, False])
def test_true_means_the_last_whole_checkpoint(trained, tmp_path, name, cut):
    _, folder = trained
    for step in (3, 20, 100):
        target = tmp_path / f"checkpoint-{step}"
        target.mkdir()
        for path in (folder / "checkpoint-6").iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint-best").mkdir()
    broken = tmp_path / "checkpoint-100" / name
    assert find_checkpoint(tmp_path, "true") == str(broken.parent)
    if cut:
        broken.write_bytes(broken.read_bytes()[:50])
    else:
        broken.unlink()
    assert find_checkpoint(tmp_path, "true") == str(tmp_path / "checkpoint-20")
    with pytest.raises(
        UsageError, match=f"checkpoint-100: half-written, {name} {'cannot be read' if cut else 'is missing'}"
    ):
        find_checkpoint(tmp_path, str(broken.parent))


@pytest.mark.parametrize("cut", [True, False])
def test_passed_memories_belong_to_a_checkpoint(train_small, fp32_flags, tmp_path, cut):
    flags = ["--state_passing", "0.5", "--stage_max_steps", "1", "--save_steps", "1"]
    train_small(*fp32_flags, *flags, "--output_dir", tmp_path / "run")
    broken = tmp_path / "run" / "checkpoint-2" / "method_0.safetensors"
    content = broken.read_bytes()
    broken.write_bytes(content[:-1]) if cut else broken.unlink()
    told = f"half-written, method_0.safetensors {'cannot be read' if cut else 'is missing'}"
    with pytest.raises(UsageError, match=told):
        find_checkpoint(tmp_path / "run", str(broken.parent))
    assert find_checkpoint(tmp_path / "run", "true").endswith("checkpoint-1")


def test_an_older_checkpoint_does_not_say_which_files_it_has(trained, tmp_path):
    _, folder = trained
    checkpoint = shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    position = json.loads((checkpoint / "curriculum.json").read_text())
    assert position.pop("files") == ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
    (checkpoint / "curriculum.json").write_text(json.dumps(position))
    (checkpoint / "rng_state.pth").unlink()
    assert find_checkpoint(tmp_path, "true") == str(checkpoint)
    (checkpoint / "scheduler.pt").write_bytes((checkpoint / "scheduler.pt").read_bytes()[:-1])
    with pytest.raises(UsageError, match="half-written, scheduler.pt cannot be read"):
        find_checkpoint(tmp_path, str(checkpoint))


def test_no_checkpoint_is_wanted_or_there(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "false") is None
    with pytest.raises(UsageError, match="holds no whole checkpoint"):
        find_checkpoint(tmp_path, "true")


def test_position_is_written_last(trained):
    _, folder = trained
    for checkpoint in folder.glob("checkpoint-*"):
        times = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
        assert max(times, key=times.get) == "curriculum.json"
        assert json.loads((checkpoint / "curriculum.json").read_text())["stages"] == [1, 2]
