"""What the documents, recipes and configurations say is true: commands parse, links lead somewhere, Python compiles and runs."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lrmt
from lrmt.cli import parse as parse_lrmt
from lrmt.training import recipe
from lrmt.training.run import _check_passing as check_passing

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "ds_configs").glob("*.yaml"))
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path, language):
    return [text for name, text in FENCE.findall(path.read_text()) if name == language]


def commands(text):
    """The command lines of a text: continuations joined, comments and indentation dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (line.strip() for line in lines) if line and not line.startswith("#")]


def launch_lines(text):
    return [line for line in commands(text) if "accelerate launch " in line]


def every_command():
    for path in DOCUMENTS:
        for text in blocks(path, "bash"):
            yield from ((path.name, line) for line in commands(text))
    for path in RECIPES:
        docstring = path.read_text().split('"""')[1]
        yield from ((path.name, line) for line in launch_lines(docstring))
    for path in [*CONFIGS, *LAUNCHES]:
        comments = "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
        found = [line[line.index("accelerate launch") :] for line in launch_lines(comments) if ".py" in line]
        yield from ((path.name, line) for line in found)


COMMANDS = list(dict.fromkeys(every_command()))


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings_of(path, flags, monkeypatch):
    """The settings that a recipe would train with."""
    seen = []
    monkeypatch.setattr(recipe, "train", lambda *settings: seen.append(settings))
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    runpy.run_path(str(path), run_name="__main__")
    return seen[0]


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=lambda text: text[:70])
def test_commands_parse(where, line, monkeypatch):
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # the environment
        words.pop(0)
    program, flags = words[0], words[1:]
    if program == "make":
        assert set(flags) <= set(TARGETS)
    elif program == "lrmt":
        parse_lrmt(flags)
    elif program == "accelerate":
        if "-m" in flags:
            assert flags[flags.index("-m") + 1] == "lrmt.cli"
            parse_lrmt(flags[flags.index("-m") + 2 :])
            return
        script = next(i for i, word in enumerate(flags) if word.endswith(".py"))
        if "--config_file" in flags[:script]:
            assert (ROOT / flags[flags.index("--config_file") + 1]).is_file()
        _, settings, _, task, *_ = settings_of(ROOT / flags[script], flags[script + 1 :], monkeypatch)
        check_passing(settings.get("state_passing", 0), task.task)
    elif program == "python":
        text = (ROOT / flags[0]).read_text()
        assert all(f'"{flag}"' in text for flag in flags[1:] if flag.startswith("--"))
    else:
        assert words[:2] == ["pip", "install"], f"{where} names a command that nothing checks: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_compiles(path):
    for text in blocks(path, "python"):
        compile(text, path.name, "exec")
        for name in re.findall(r"^from lrmt import (\w+)$", text, re.MULTILINE):
            assert hasattr(lrmt, name)


def test_readme_example_runs(capsys):
    (example,) = [text for text in blocks(ROOT / "README.md", "python") if "from_backbone" in text]
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor(")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_parse_and_open_with_their_launch_line(path, monkeypatch):
    lines = path.read_text().splitlines()
    opening = [line for line in lines[:4] if line.startswith("# accelerate launch ")]
    assert opening, "the first lines name the command"
    script = RECIPES[0].parent / re.search(r"recipes/(\w+\.py)", opening[0])[1]
    default = f'"{path.name}"' in script.read_text()
    assert default or f"--config recipes/configs/{path.name}" in opening[0]
    wanted = yaml.safe_load("\n".join(lines))
    of_the_user = ["--text_path", "books"] if wanted["task"] == "text" else []
    _, settings, *parsed = settings_of(script, ["--config", str(path), *of_the_user], monkeypatch)
    values = settings | {key: value for arguments in parsed for key, value in vars(arguments).items()}
    for key, value in wanted.items():
        got = getattr(values[key], "value", values[key])
        assert got == value or float(got) == float(value), key


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.name)
def test_launch_configurations_name_themselves_and_their_json(path):
    text = path.read_text()
    assert f"ds_configs/{path.name}" in text
    config = yaml.safe_load(text).get("deepspeed_config", {})
    if config:
        assert (ROOT / config["deepspeed_config_file"]).is_file()


def test_help_lists_the_commands():
    shown = subprocess.run(
        [sys.executable, "-m", "lrmt.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in {line.split()[1] for _, line in COMMANDS if line.startswith("lrmt ")}:
        assert command in shown


def test_ci_runs_the_makefile():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
