"""The shipped launch configurations: they parse, and set nothing in two places."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from lrmt.errors import UsageError
from lrmt.training.run import _check_precision

ROOT = Path(__file__).parents[1]
YAMLS = sorted(ROOT.glob("ds_configs/*.yaml"))
JSONS = sorted(ROOT.glob("ds_configs/*.json"))
AUTO = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_accelerate_reads_it(path):
    """accelerate refuses unknown keys, and a precision or batch size beside `deepspeed_config_file`."""
    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert "mixed_precision" not in written and "gradient_accumulation_steps" not in written
    assert bool(written.get("use_cpu")) == ("cpu" in path.stem)
    if config.distributed_type != DistributedType.DEEPSPEED:
        assert "deepspeed_config" not in written
        return
    named = set(written["deepspeed_config"])
    if config.num_machines > 1:  # else accelerate would reach for pdsh
        assert written["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
        named.discard("deepspeed_multinode_launcher")
    assert named == {"deepspeed_config_file", "zero3_init_flag"}
    settings = json.loads((ROOT / written["deepspeed_config"]["deepspeed_config_file"]).read_text())
    # set with ZeRO-3 alone: the backbone's loader asks it whether to shard
    assert written["deepspeed_config"]["zero3_init_flag"] == (settings["zero_optimization"]["stage"] == 3)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_its_name_and_its_launch_line_are_true(path):
    written = yaml.safe_load(path.read_text())
    count = re.search(r"(?:(\d+)x)?(\d+)(?:gpu|cpu)$", path.stem)
    if count:
        machines, each = int(count[1] or 1), int(count[2])
        assert (written["num_machines"], written["num_processes"]) == (machines, machines * each)
    line = re.search(r"^# accelerate launch --config_file (\S+) (\S+\.py)", path.read_text(), re.MULTILINE)
    assert ROOT / line[1] == path and (ROOT / line[2]).is_file()


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.stem)
def test_deepspeed_settings_are_left_to_the_flags(path):
    settings = json.loads(path.read_text())
    assert settings["bf16"] == {"enabled": "auto"}
    assert all(settings[key] == "auto" for key in AUTO)
    assert "optimizer" not in settings and "scheduler" not in settings
    assert any(path.name in yaml_path.read_text() for yaml_path in YAMLS), "no YAML names it"
    if settings["zero_optimization"]["stage"] == 3:
        assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.stem)
def test_deepspeed_accepts_it(path, monkeypatch):
    """Once the flags have filled in what is `auto`; DeepSpeed refuses unknown settings of ZeRO."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    settings = json.loads(path.read_text())
    settings["zero_optimization"] = {k: v for k, v in settings["zero_optimization"].items() if v != "auto"}
    assert config.get_zero_config(settings).stage == settings["zero_optimization"]["stage"]


@pytest.mark.parametrize("dtype, bf16", [("float32", True), ("bfloat16", False)])
def test_two_precisions_are_refused(dtype, bf16):
    _check_precision(SimpleNamespace(dtype="bfloat16"), SimpleNamespace(bf16=True, fp16=False))
    with pytest.raises(UsageError, match="--dtype"):
        _check_precision(SimpleNamespace(dtype=dtype), SimpleNamespace(bf16=bf16, fp16=False))
