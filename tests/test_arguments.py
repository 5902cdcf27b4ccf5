"""Flags, YAML keys and defaults are one thing: flags win over the file, the file over the defaults."""

import dataclasses

import pytest

from lrmt.arguments import CurriculumArguments, ModelArguments, TaskArguments, TrainingArguments
from lrmt.errors import UsageError
from lrmt.flags import Group, parse_arguments
from lrmt.models import METHODS, RmtConfig
from lrmt.training.recipe import parse_recipe

RMT = Group("RMT", RmtConfig, RmtConfig.own_settings())
OURS = (ModelArguments, TaskArguments, RMT, CurriculumArguments, TrainingArguments)


@pytest.fixture
def parse(tmp_path):
    (tmp_path / "default.yaml").write_text("")

    def run(*flags, yaml=None, types=OURS):
        if yaml is not None:
            (tmp_path / "given.yaml").write_text(yaml)
            flags = ["--config", str(tmp_path / "given.yaml"), *flags]
        return parse_arguments(*types, default_config=tmp_path / "default.yaml", description="", args=list(flags))

    return run


def test_defaults(parse):
    model, task, rmt, curriculum, training = parse()
    assert model.use_peft and model.load_in_4bit and model.use_bnb_nested_quant and model.bnb_4bit_quant_type == "nf4"
    assert not getattr(model, "trust_remote_code", False)
    assert task.task == "passkey" and curriculum.curriculum_stages == [1, 2, 4, 8]
    assert training.report_to in ([], "none") and not training.logging_nan_inf_filter


def test_file_over_defaults_and_flags_over_file(parse):
    yaml = "segment_length: 96\nnum_memory_tokens: 8\ncurriculum_stages: [1, 3]\nload_in_4bit: false\nlearning_rate: 1e-3\n"
    model, _, rmt, curriculum, training = parse("--segment_length", "128", "--curriculum_stages", "2", "5", yaml=yaml)
    assert (rmt["segment_length"], rmt["num_memory_tokens"]) == (128, 8)
    assert curriculum.curriculum_stages == [2, 5]
    assert model.load_in_4bit is False
    assert training.learning_rate == 1e-3  # which YAML reads as a string


def test_config_flag_takes_either_form(parse, tmp_path):
    (tmp_path / "a.yaml").write_text("segment_length: 77")
    for flags in (["--config", str(tmp_path / "a.yaml")], [f"--config={tmp_path / 'a.yaml'}"]):
        assert parse(*flags)[2]["segment_length"] == 77
    (tmp_path / "b.yaml").write_text("segment_length: 78")
    assert parse(*flags, "--config", str(tmp_path / "b.yaml"))[2]["segment_length"] == 78  # the last wins


def test_a_dataset_is_its_own_task(parse):
    assert parse("--dataset_name", "rows.jsonl")[1].task == "dataset"
    assert parse("--text_path", "books")[1].task == "text"
    assert parse("--dataset_name", "rows.jsonl", yaml="task: text")[1].task == "dataset"
    for task in ("dataset", "passkey, dataset"):
        with pytest.raises(UsageError, match=f"`--task {task}` needs `--dataset_name`; got none"):
            parse("--task", task)
        assert parse("--task", task, "--dataset_name", "rows.jsonl")[1].task == task  # mixed


def test_a_task_of_the_command_line_is_not_dropped(tmp_path):
    (tmp_path / "default.yaml").write_text("task: passkey")

    def task_of(*args):
        return parse_recipe("rmt", default_config=tmp_path / "default.yaml", args=args)[3].task

    assert task_of("--dataset_name", "rows.jsonl") == "dataset"  # that of a file makes way
    assert task_of("--task=qa1,dataset", "--dataset_name", "rows.jsonl") == "qa1,dataset"
    for path, name in (("--dataset_name", "dataset"), ("--text_path", "text")):
        with pytest.raises(UsageError, match=f"`--task qa1` is another task than `{path} x`; .*`--task qa1,{name}`"):
            task_of("--task", "qa1", path, "x")


def test_every_field_of_ours_is_documented_and_rmt_fields_are_the_configs(parse):
    for arguments in (ModelArguments, TaskArguments, CurriculumArguments, TrainingArguments):
        own = arguments.__annotations__
        for field in dataclasses.fields(arguments):
            if field.name in own:
                assert field.metadata.get("help"), f"{arguments.__name__}.{field.name}"
    config, (*_, rmt, _, _) = RmtConfig(), parse()
    assert rmt and rmt == {name: getattr(config, name) for name in rmt}


@pytest.mark.parametrize("method", METHODS)
def test_no_key_means_two_things(method):
    config = METHODS[method].config_class
    others = (f for arguments in OURS if arguments is not RMT for f in dataclasses.fields(arguments))
    names = [f.name for f in (*others, *config.own_settings())]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--segment_lenght", "64"], "unknown flag `--segment_lenght`; did you mean `--segment_length`?"),
        (["--segment_lenght=64"], "did you mean `--segment_length`?"),
        (["--zzz"], "unknown flag `--zzz`; see --help"),
        (["--segment", "64"], "unknown flag `--segment`"),  # no guessing of abbreviations
        (["--segment_length", "long"], "invalid int value: 'long'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--load_in_4bit", "perhaps"], "perhaps"),
        (["--load_in_8bit", "true"], "`--load_in_8bit` is not supported"),
        (["--dtype", "int8"], "`--dtype` must be bfloat16, float32 or float16; got int8"),
        (["--eval_strategy", "often"], "often"),
        (["stray"], "stray"),
        (["--config"], "--config"),
    ],
)
def test_bad_flags(parse, flags, message):
    with pytest.raises(UsageError) as caught:
        parse(*flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("segment_lenght: 64", "given.yaml` `segment_lenght`; did you mean `segment_length`?"),
        ("segment_length: long", "key `segment_length` in"),
        ("segment_length: 1.5", "key `segment_length` in"),
        ("segment_length: [1, 2]", "key `segment_length` in"),
        ("segment_length: true", "key `segment_length` in"),
        ("load_in_4bit: 7", "key `load_in_4bit` in"),
        ("curriculum_stages: [1, two]", "key `curriculum_stages` in"),
        ("- a\n- b", "must be a mapping of keys to values; got list"),
        ("a: [1", "is not YAML"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_bad_files(parse, yaml, message):
    with pytest.raises(UsageError) as caught:
        parse(yaml=yaml)
    assert message.replace("given.yaml` ", "") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_shows_what_is_there(parse, tmp_path):
    with pytest.raises(UsageError, match="nowhere.yaml: No such file.*holds default.yaml"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


def test_a_binary_file_is_no_yaml(parse, tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="is not YAML"):
        parse("--config", str(tmp_path / "x.yaml"))


def test_help_names_every_key(parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("segment_length", "num_memory_tokens", "curriculum_stages", "load_in_4bit", "dry_run", "config"):
        assert f"--{name}" in out
