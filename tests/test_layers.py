"""Imports point one way, and heavy ones wait until something needs them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "matplotlib", "datasets", "deepspeed")


def test_contract():
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_contract_can_break(tmp_path):
    """The linter of this version sees a wrong import: the contract is no empty promise."""
    pytest.importorskip("importlinter")
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    for layer in (name.strip() for row in contract["layers"] for name in row.split("|")):
        layer = layer.removeprefix("lrmt.")
        (tmp_path / "lrmt" / layer).mkdir(parents=True)
        (tmp_path / "lrmt" / layer / "__init__.py").write_text("")
    (tmp_path / "lrmt" / "__init__.py").write_text("")
    (tmp_path / "lrmt" / "models" / "__init__.py").write_text("import lrmt.tasks")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "lrmt.models -> lrmt.tasks" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags",
    [["--help"], ["evaluate", "--help"], ["merge", "--help"], ["merge", "--adaptor_path", "x"]]
    + [["score", "nowhere"], ["report", "nowhere"], ["data", "build", "--help"], ["evaluate", "--harness", "--help"]]
    + [["evaluate", "--adapter_path", "nowhere", "--task", "qa1"], ["inspect", "--help"]],
)
def test_help_and_mistakes_import_nothing_heavy(flags):
    code = (
        "import sys\nfrom lrmt.cli import main\n"
        f"try: main({flags!r})\nexcept SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_nothing_imports_a_recipe():
    for path in (ROOT / "lrmt").rglob("*.py"):
        assert "import recipes" not in path.read_text() and "from recipes" not in path.read_text(), path
