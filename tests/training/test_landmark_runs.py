"""Landmark attention through the same commands as RMT: train, resume, start from, evaluate, merge."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lrmt
from lrmt.cli import main
from lrmt.errors import UsageError
from lrmt.models import LandmarkForCausalLM
from lrmt.publishing.merge import merge_adapter
from lrmt.training.curriculum import Curriculum

SMALL = """
    --block_length 16 --context_length 200 --top_k 2 --num_digits 2 --stage_max_steps 4 --eval_samples 4 --eval_steps 2
    --save_steps 2 --logging_steps 1 --lora_r 4 --warmup_steps 0 --per_device_train_batch_size 4 --disable_tqdm true
"""


@pytest.fixture(scope="module")
def train(run_recipe, backbones):
    def run(*flags):
        return run_recipe("landmark_llama", *SMALL.split(), "--model_name_or_path", backbones["llama"], *flags)

    return run


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("landmark") / "run"
    train("--output_dir", folder)
    return folder


def landmark_of(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return [tensor for name, tensor in weights.items() if "landmark_embedding" in name]


def test_lora_and_the_landmark_train(folder, backbones):
    mean = lrmt.load(folder).get_base_model().get_input_embeddings().weight.float().mean(0)
    (landmark,) = landmark_of(folder)
    assert float((landmark[0] - mean).abs().max()) > 1e-3
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["landmark_embedding"]


def test_training_texts_end_anywhere_in_a_block(train, tmp_path):
    """Of one length only, a landmark would never stand inside a question."""
    train("--output_dir", tmp_path / "run", "--stage_max_steps", "2")
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "curriculum.json").read_text())
    curriculum = Curriculum(stages=[1], max_steps=[2], vary_lengths=state["vary_lengths"], slack=state["slack"])
    # 15 tokens and a landmark a block
    assert {curriculum.draw_length(step, 200) for step in range(400)} == set(range(200 - 14, 201))


def test_a_frozen_mean_is_left_alone(train, tmp_path):
    train("--landmark_embedding", "frozen_mean", "--output_dir", tmp_path / "run")
    names = list(load_file(tmp_path / "run" / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)
    model = lrmt.load(tmp_path / "run").get_base_model()
    mean = model.get_input_embeddings().weight.float().mean(0)
    torch.testing.assert_close(model.landmark_embedding.weight[0].float(), mean)


def test_resumes_with_the_weights_of_one_go(train, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (folder / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-2")
    train("--output_dir", tmp_path / "run", "--resume_from_checkpoint", "true", "--retrieval", "chunk")
    got, want = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run", folder))
    assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(UsageError, match="trained with block_length 16; got `--block_length` 20"):
        train("--output_dir", tmp_path / "run", "--resume_from_checkpoint", "true", "--block_length", "20")


def test_starts_from_another_adapter(train, folder, tmp_path):
    train("--init_adapter_path", folder, "--learning_rate", "0", "--output_dir", tmp_path / "run")
    assert torch.equal(landmark_of(tmp_path / "run")[0], landmark_of(folder)[0])


def test_backbone_layers_may_be_recomputed(train, folder, tmp_path):
    train("--gradient_checkpointing", "true", "--output_dir", tmp_path / "run")
    assert torch.allclose(landmark_of(tmp_path / "run")[0], landmark_of(folder)[0], atol=1e-5)


def test_merged_equals_unmerged(folder, tmp_path):
    gaps = merge_adapter(str(folder), str(tmp_path / "merged"))
    assert gaps["same_base"] < 1e-4
    merged = lrmt.load(tmp_path / "merged")
    assert isinstance(merged, LandmarkForCausalLM)
    unmerged = lrmt.load(folder, load_in_4bit=False, dtype="float32")
    text = torch.randint(10, 900, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((merged(text).logits - unmerged(text).logits).abs().max()) < 1e-3


def test_evaluates_beside_the_backbone(folder, tmp_path):
    command = f"evaluate --adapter_path {folder} --task passkey --num_digits 2 --lengths 1 3 --num_samples 3 --output_dir {tmp_path}/e"
    assert main([*command.split(), "--top_k", "1", "--retrieval", "chunk", "--offload_blocks"]) == 0
    records = json.loads((tmp_path / "e" / "results.json").read_text())
    assert [(r["model"], r["length_tokens"]) for r in records] == [
        (model, length) for length in (200, 600) for model in ("landmark", "untrained", "backbone")
    ]
    model = lrmt.load(folder, top_k=1, retrieval="chunk", offload_blocks=True).get_base_model().config
    assert (model.top_k, model.retrieval, model.offload_blocks) == (1, "chunk", True)
    with pytest.raises(
        UsageError, match="`--segment_length` is no setting of how a landmark model reads .known: top_k"
    ):
        lrmt.load(folder, segment_length=3)
    with pytest.raises(UsageError, match="`--top_k` must be 1 or more"):
        lrmt.load(folder, top_k=0)
