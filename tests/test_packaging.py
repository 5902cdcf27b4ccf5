"""What is imported is declared: no package comes along by the grace of another one."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """Third-party top-level modules that a file imports anywhere, or asks `require` for."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            names += [argument.value for argument in node.args[1:]]
    return {name.split(".")[0] for name in names} - {"lrmt"} - sys.stdlib_module_names


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def declared() -> set[str]:
    """Distributions of setup.cfg, those of tests left out."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = [value for name, value in config["options.extras_require"].items() if name != "dev"]
    lines = "\n".join([config["options"]["install_requires"], *extras]).split()
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


def test_every_import_is_declared(declared):
    found = {name: path for path in (ROOT / "lrmt").rglob("*.py") for name in imported(path)}
    assert {"yaml", "faiss", "torch"} <= found.keys()
    of = packages_distributions()
    missing = {
        name: str(path) for name, path in found.items() if not declared & {normal(d) for d in of.get(name, [name])}
    }
    assert not missing
