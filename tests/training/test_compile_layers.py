"""`--compile_layers`: the same run, with the layers compiled, or as they are where that does not work."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, LlamaConfig

from lrmt.adapters.backbone import compile_layers
from lrmt.arguments import ModelArguments
from lrmt.errors import UsageError
from lrmt.models import METHODS
from lrmt.models.rmt import RmtForCausalLM
from lrmt.training.build import build_empty_model


def logged(trainer) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def flags():
    return ["--checkpoint_segments", "true", "--stage_max_steps", "2", "--state_passing", "0.5", "--eval_samples", "2"]


def test_steps_are_those_of_layers_as_they_are(train_small, fp32_flags, flags, capsys):
    eager = train_small(*fp32_flags, *flags)
    compiled = train_small(*fp32_flags, *flags, "--compile_layers", "true")
    assert any(module._compiled_call_impl for module in compiled.model.modules())
    assert "does not work" not in capsys.readouterr().out
    for (loss, norm), want in zip(logged(compiled), logged(eager), strict=True):
        assert (loss, norm) == pytest.approx(want, rel=1e-4)
    saved = [name for name, _ in compiled.model.named_parameters()]
    assert saved == [name for name, _ in eager.model.named_parameters()]


@pytest.mark.parametrize("method", ["rmt", "rmt_retrieval", "armt"])
def test_all_layers_share_what_is_compiled(method, recwarn):
    """Of more than torch would compile one by one; with a KV cache they run as they are."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, max_position_embeddings=64,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = METHODS[method].from_backbone(
        AutoModelForCausalLM.from_config(config), num_memory_tokens=2, segment_length=12
    )
    text = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))

    def run():
        loss = model.train()(text, labels=text).loss
        loss.backward()
        said = model.eval().generate(text, max_new_tokens=14, do_sample=False)
        return float(loss), float(model.memory_embedding.weight.grad.norm()), said.tolist()

    want = run()
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    model.zero_grad()
    loss, norm, said = run()
    assert (loss, norm) == (pytest.approx(want[0], rel=1e-5), pytest.approx(want[1], rel=1e-4)) and said == want[2]
    assert 0 < counter.frame_count < 8, counter.frame_count


def test_landmark_attention_is_not_compiled():
    with pytest.raises(UsageError, match="`--compile_layers`: the attention of a landmark model"):
        build_empty_model(METHODS["landmark"], ModelArguments(compile_layers=True), {})


def test_where_it_does_not_work_layers_run_as_they_are(train_small, fp32_flags, flags, capsys, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    trainer = train_small(*fp32_flags, *flags, "--compile_layers", "true")
    assert not any(module._compiled_call_impl for module in trainer.model.modules())
    out = capsys.readouterr().out
    assert out.count("`--compile_layers`: torch.compile does not work here") == 1 and "no C++ compiler" in out


def test_not_under_deepspeed():
    with pytest.raises(UsageError, match="`--compile_layers true`: DeepSpeed"):
        build_empty_model(RmtForCausalLM, ModelArguments(compile_layers=True), {}, sharded=True)
