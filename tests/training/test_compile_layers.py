"""`--compile_layers`: the same run, with the layers compiled, or as they are where that does not work."""

import pytest
import torch

from lrmt.arguments import ModelArguments
from lrmt.errors import UsageError
from lrmt.evaluation.run import load_on_device
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.flags import build
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


def test_where_it_does_not_work_layers_run_as_they_are(train_small, fp32_flags, flags, capsys, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", no_compiler)
    trainer = train_small(*fp32_flags, *flags, "--compile_layers", "true")
    assert not any(module._compiled_call_impl for module in trainer.model.modules())
    out = capsys.readouterr().out
    assert out.count("`--compile_layers`: torch.compile does not work here") == 1 and "no C++ compiler" in out


def test_not_under_deepspeed():
    with pytest.raises(UsageError, match="`--compile_layers true`: DeepSpeed"):
        build_empty_model(RmtForCausalLM, ModelArguments(compile_layers=True), {}, sharded=True)


def test_evaluation_compiles_what_it_opens(train_small, fp32_flags, flags, tmp_path):
    folder = tmp_path / "run"
    train_small(*fp32_flags, *flags, "--output_dir", folder)
    text, logits = torch.randint(10, 900, (2, 150), generator=torch.Generator().manual_seed(0)), []
    for asked in (False, True):
        settings = build(
            *EvaluationSettings.parse(
                ["--adapter_path", str(folder), "--task", "passkey", "--compile_layers", str(asked)], "lrmt evaluate"
            )
        )
        model = load_on_device(settings)
        assert any(module._compiled_call_impl for module in model.modules()) == asked
        with torch.no_grad():
            logits.append(model(text).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
