"""One mechanism for flags: what it makes of a dataclass, and that an option of a task is one thing wherever it is offered."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from transformers import HfArgumentParser
from transformers import TrainingArguments as HfTrainingArguments
from trl import ModelConfig

from lrmt.arguments import CurriculumArguments, ModelArguments, TaskArguments
from lrmt.data.show import ShowSettings
from lrmt.data.write import BuildSettings
from lrmt.errors import UsageError
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.flags import Flags, Group, build, flag, groups_of, parse_arguments
from lrmt.models import METHODS, LongContextConfig, RmtForCausalLM
from lrmt.models.config import setting
from lrmt.tasks.options import EarlyOptions, RepeatOptions, SpanOptions, TaskOptions, TextOptions
from lrmt.training.recipe import parse_recipe

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(kw_only=True)
class Thing:
    """What is tested. And more."""

    paths: list[str] = flag(help="Some.", metavar="PATH", positional=True)
    count: int = flag(3, "How many.")
    share: float | None = flag(None, "Of it, in 100 %.")
    side: Literal["left", "right"] = flag("left", "Which.")
    names: tuple[str, ...] = flag((), "Called.")
    sizes: tuple[int, ...] = flag((1, 2), "Long.", nargs="*")
    quiet: bool = flag(False, "Says nothing.")
    careful: bool = flag(True, "Looks twice.")
    four_bits: bool | None = flag(None, "Small.")
    inner: dict = dataclasses.field(default_factory=dict)


@pytest.fixture
def parse():
    return lambda line: build(Thing, Flags(Thing, program="lrmt thing").parse(line.split()))


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("a b", {"paths": ["a", "b"]}),
        ("a --count 4 --share 0.5 --side right", {"count": 4, "share": 0.5, "side": "right"}),
        ("a --count=-4 --share -0.001", {"count": -4, "share": -0.001}),
        ("a --names x y --sizes 5", {"names": ("x", "y"), "sizes": (5,)}),
        ("a --sizes", {"sizes": ()}),
        ("--quiet a", {"paths": ["a"], "quiet": True}),  # the word behind it is a path
        ("--quiet true a --careful FALSE --four_bits", {"paths": ["a"], "quiet": True, "careful": False, "four_bits": True}),
        ("a --no_careful --no_four_bits", {"careful": False, "four_bits": False}),
        ("a --no-careful --four-bits=no", {"careful": False, "four_bits": False}),
        ("a --count 4 --count 5", {"count": 5}),
    ],
)  # fmt: skip
def test_a_line_becomes_an_instance(parse, line, given):
    assert parse(line) == Thing(**{"paths": ["a"]} | given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --coumt 4", "no flag --coumt; did you mean --count?; see lrmt thing --help"),
        ("a --cou 4", "no flag --cou"),
        ("a --inner x", "no flag --inner"),
        ("a --no_quiet", "no flag --no_quiet"),  # it is off
        ("a --no_count", "no flag --no_count"),
        ("--count 4", "PATH"),
        ("a --count many", "--count: invalid int value: 'many'; see --help"),
        ("a --count 1.5", "--count: invalid int value: '1.5'"),
        ("a --count", "--count"),
        ("a --side lift", "--side must be left or right; got lift; did you mean left?"),
        ("a --sizes 1 x", "--sizes: invalid int value: 'x'"),
        ("a --four_bits=maybe", "--four_bits: invalid bool value: 'maybe'"),
        ("a --names", "--names"),
    ],
)
def test_mistakes_are_one_line(parse, line, message):
    with pytest.raises(UsageError) as caught:
        parse(line)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_shows_defaults_and_titles(capsys):
    with pytest.raises(SystemExit):
        Flags(Thing, program="lrmt thing", shown={"count": 0}).parse(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "What is tested. And more: PATH Some. --count COUNT How many. (default: 0)" in out
    assert "in 100 %." in out and "Long. (default: 1 2)" in out and "usage: lrmt thing PATH … [flags]" in out


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("count: 4\nside: right\nnames: x\nsizes: [1]", {"count": 4, "side": "right", "names": ("x",), "sizes": (1,)}),
        ("share: 1e-3\nfour_bits: null\nquiet: yes", {"share": 1e-3, "four_bits": None, "quiet": True}),
        ("names: [é]\n", {"names": ("é",)}),
    ],
)
def test_a_file_is_read_as_flags_are(tmp_path, text, given):
    for encoding in ("utf-8", "utf-8-sig"):  # a byte order mark is no text
        (tmp_path / "x.yaml").write_text(text, encoding=encoding)
        assert Flags(Thing).read_file(tmp_path / "x.yaml") == given


@pytest.mark.parametrize(
    "text", ["count: null", "count: [1]", "names: {a: 1}", "side: middle", "sizes: [1, [2]]", "quiet: 2", "inner: {a: 1}"]
)  # fmt: skip
def test_a_wrong_key_is_one_line(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"key .*`?{text.split(':')[0]}`?"):
        Flags(Thing).read_file(tmp_path / "x.yaml")


def test_a_file_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "x.yaml").write_text("a: é\n", encoding="utf-8")
    code = "import sys; from lrmt.flags import _read_yaml; print(ascii(_read_yaml(sys.argv[1])))"
    command = [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "x.yaml")]
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout == "{'a': '\\xe9'}\n", done.stderr


@pytest.mark.parametrize("arguments", [ModelConfig, HfTrainingArguments])
def test_flags_of_trl_and_transformers_are_what_their_own_parser_makes_of_them(arguments):
    theirs = {a.dest: a for a in HfArgumentParser(arguments)._actions if not a.option_strings[0].startswith("--no")}
    ours = Flags(arguments).flags
    assert theirs.keys() - {"help"} == ours.keys() | ({"parallelism_config"} & theirs.keys())  # which no word spells
    for name, one in ours.items():
        action = theirs[name]
        assert bool(one.many) == (action.nargs == "+"), name
        assert one.default == action.default or (name, one.default) == ("debug", ""), name  # they drop that of a list
        if action.choices:
            assert list(one.choices) == list(map(str, action.choices)), name
        else:
            kind = "bool" if action.type.__name__ == "string_to_bool" else action.type.__name__
            assert one.kind == kind, name


def test_unions_and_enumerations_of_transformers():
    flags = Flags(HfTrainingArguments)
    given = flags.parse(
        ["--optim", "sgd", "--lr_scheduler_kwargs", '{"min_lr": 1}', "--tf32", "false", "--debug", "underflow_overflow"]
    )
    arguments = HfTrainingArguments(**{name: value for name, value in given.items() if name != "tf32"}, use_cpu=True)
    assert arguments.optim.value == "sgd" and arguments.lr_scheduler_kwargs == {"min_lr": 1}
    assert [one.value for one in arguments.debug] == ["underflow_overflow"] and given["tf32"] is False
    with pytest.raises(UsageError, match="`--optim` must be adamw_torch, .* or .*; got adamm; did you mean"):
        flags.parse(["--optim", "adamm"])


def test_help_of_a_recipe_shows_what_its_file_says(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("eval_samples: 77")
    for flags in (["--config", str(tmp_path / "x.yaml")], [f"--config={tmp_path / 'x.yaml'}"]):
        with pytest.raises(SystemExit):
            parse_arguments(
                CurriculumArguments, default_config=tmp_path / "no.yaml", description="", args=[*flags, "-h"]
            )
        out = " ".join(capsys.readouterr().out.split())
        assert "(default: 77)" in out and "(default: 1 2 4 8)" in out


def test_a_flag_that_did_nothing_is_refused_and_a_file_of_before_is_read(tmp_path):
    (tmp_path / "default.yaml").write_text("")

    def parse(*args):
        return parse_recipe("rmt", default_config=tmp_path / "default.yaml", args=args)[3]

    for name, value in TaskArguments.of_before.items():
        with pytest.raises(UsageError, match=f"unknown flag `--{name}`; did you mean"):
            parse(f"--{name}", str(value))
    shipped = ROOT / "lrmt" / "assets" / "rmt-qa1" / "arguments.yaml"
    task = parse("--config", str(shipped), "--babi_dir", "x")
    assert (task.task, task.early_facts_share, task.dataset_split) == ("qa1,qa1,passkey", 0.5, None)
    (tmp_path / "asks.yaml").write_text("dataset_train_split: validation")
    with pytest.raises(UsageError, match="`dataset_train_split`; did you mean `dataset_split`"):
        parse("--config", str(tmp_path / "asks.yaml"))


# ---------------------------------------------------------------------- options of tasks

#: where an option is not offered, and why
NOT_OFFERED = {
    "recipe": {
        *dataclasses.fields(RepeatOptions),
        *dataclasses.fields(SpanOptions),
    },  # books begin again, facts lie anywhere
    "evaluate": {*dataclasses.fields(EarlyOptions), *dataclasses.fields(SpanOptions)},  # which has --depths
    "data build": {*dataclasses.fields(EarlyOptions), *dataclasses.fields(TextOptions)},  # it makes haystacks alone
}
NOT_HAYSTACKS = {"num_digits", "passkey_wording", "dataset_name", "dataset_config", "dataset_split"}


def test_an_option_of_a_task_is_the_same_wherever_it_is_offered():
    offered = {
        "recipe": Flags(TaskArguments).flags,
        "evaluate": Flags(*EvaluationSettings.modes()).flags,
        "data build": Flags(BuildSettings).flags,
        "data show": Flags(ShowSettings).flags,
        **{mode.__name__: Flags(mode).flags for mode in EvaluationSettings.modes()},
    }
    options = {field.name: field for field in dataclasses.fields(TaskOptions)}
    for command, flags in offered.items():
        for name in flags.keys() & options:
            told = (flags[name].default, flags[name].help)
            assert told == (options[name].default, options[name].metadata["help"]), (command, name)
    for command, missing in NOT_OFFERED.items():
        without = {field.name for field in missing} | (NOT_HAYSTACKS if command == "data build" else set())
        assert options.keys() - offered[command].keys() == without, command


def test_an_option_of_a_task_is_declared_once():
    options = {field.name for field in dataclasses.fields(TaskOptions)}
    declared = []
    for path in (ROOT / "lrmt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.target.id in options:
                declared.append((node.target.id, path.name))
    assert sorted(declared) == sorted((name, "options.py") for name in options)


def test_the_command_line_is_a_table():
    assert len((ROOT / "lrmt" / "cli.py").read_text(encoding="utf-8").splitlines()) <= 200


# ---------------------------------------------------------------------- a method's own settings


class ThirdConfig(LongContextConfig):
    """Settings of a method that nothing but this file knows."""

    model_type = "third"
    reading_settings: ClassVar[tuple[str, ...]] = ("temperature_of_memory",)

    window_of_memory: int = setting(5, "How far it sees.")
    temperature_of_memory: float = setting(1.0, "How warm.")
    kind_of_memory: Literal["soft", "hard"] = setting("soft", "How it is.")


def test_a_third_method_has_its_flags_in_a_recipe_of_its_own(tmp_path, monkeypatch, capsys):
    model_class = type("ThirdForCausalLM", (RmtForCausalLM,), {"config_class": ThirdConfig})
    monkeypatch.setitem(METHODS, "third", model_class)
    (tmp_path / "third.yaml").write_text("window_of_memory: 7\ntask: qa1\n")

    def parse(*args):
        return parse_recipe("third", default_config=tmp_path / "third.yaml", args=args)

    found, settings, _, task, *_ = parse("--kind_of_memory", "hard")
    assert (found, task.task) == (model_class, "qa1")
    assert settings == {"window_of_memory": 7, "temperature_of_memory": 1.0, "kind_of_memory": "hard"}
    with pytest.raises(UsageError, match="unknown flag `--segment_length`"):
        parse("--segment_length", "3")
    with pytest.raises(UsageError, match="`--kind_of_memory` must be soft or hard; got sift"):
        parse("--kind_of_memory", "sift")
    with pytest.raises(SystemExit):
        parse("--help")
    assert "How far it sees. (default: 7)" in " ".join(capsys.readouterr().out.split())


def test_groups_have_titles_and_keep_the_order_of_bases():
    titles = [group.title for group in groups_of(TaskArguments)]
    assert titles[:2] == ["What is to be remembered", "bAbI's stories"]
    assert [group.title for group in groups_of(ModelArguments)][1] == "ModelConfig of trl"
    for mode in EvaluationSettings.modes():
        shown = list(dict.fromkeys(group.title for group in groups_of(mode)))
        want = ["method", "task", "lengths", "baselines", "output"]
        assert shown == [title for title in want if title in shown] and {"method", "task", "output"} <= {*shown}
    assert Group("x", ThirdConfig, ThirdConfig.own_settings()).fields[0].name == "window_of_memory"
