"""`lrmt score`: its tables, records and figures."""

import json
import os
from pathlib import Path

import pytest

from lrmt import cli
from lrmt.evaluation.babilong.predictions import Predictions, build_variant, write_predictions
from lrmt.evaluation.babilong.rescoring import RULES, score_folder

DATA = Path(os.environ.get("LRMT_DATA", Path(__file__).parents[4] / "shared" / "data"))
BARE, FULL = build_variant([]), build_variant(["instruction", "examples", "post_prompt", "chat_template"])


@pytest.fixture
def folder(tmp_path):
    """qa7 tells the rules apart: official never takes "none", contains takes an answer with other labels."""
    qa7 = [
        ("none", "none", "How many?"),
        ("one", "one", "How many?"),
        ("one", "one or two", "How many?"),
        ("two", "", "How many?"),
    ]
    qa1 = [("kitchen", "kitchen", "Where is Mary?"), ("office", "garden", "Where is Mary?")]
    for task, length, variant, rows in [
        ("qa7", "4k", FULL, qa7), ("qa1", "4k", FULL, qa1), ("qa1", "16k", FULL, qa1[:1]), ("qa1", "0k", BARE, qa1),
    ]:  # fmt: skip
        write_predictions(tmp_path / "evals", Predictions("org/name", task, length, variant, rows), {}, {})
    return tmp_path / "evals"


def test_records_hold_each_rule_of_each_cell(folder, tmp_path):
    records = score_folder(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == records
    found = {(r["task"], r["length_tokens"], r["variant"], r["rule"]): (r["accuracy"], r["n"]) for r in records}
    assert len(found) == len(records) == 12
    assert [found["qa7", 4000, FULL, rule] for rule in RULES] == [(0.25, 4), (0.5, 4), (0.75, 4)]
    assert [found["qa1", 0, BARE, rule] for rule in RULES] == [(0.5, 2)] * 3
    assert {r["model"] for r in records} == {"org/name"}
    assert all(r["ci_low"] < r["accuracy"] <= r["ci_high"] for r in records if r["accuracy"])


def test_tables_are_tasks_by_lengths_of_each_prompt_and_rule(folder, capsys):
    score_folder(folder)
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 6
    assert [title.split("\n")[1].split(":")[0] for title in tables] == [
        *(f"question only, scored {rule}" for rule in RULES),
        *(f"instruction + examples + post prompt + chat template, scored {rule}" for rule in RULES),
    ]
    rows = [line.split() for line in tables[3].split("\n")[2:]]
    assert rows[0] == ["task", "4k", "16k"]
    assert rows[2:] == [["qa1", "50.0", "100.0"], ["qa7", "25.0", "-"]]
    assert "n = 1 to 4" in tables[3] and "n = 2\n" in tables[0]


def test_figures_and_overwriting(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["score", str(folder), "--output_dir", str(out)]) == 0
    names = ["scores.json", *(f"heatmap_{rule}.png" for rule in RULES)]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    figures = [(out / name).read_bytes() for name in names[1:]]
    assert all(figure.startswith(b"\x89PNG") for figure in figures)
    assert len(set(figures)) == 3
    (out / "scores.json").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", str(folder), "--output_dir", str(out)])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (out / "scores.json").read_text() == "mine"
    assert cli.main(["score", str(folder), "--output_dir", str(out), "--overwrite"]) == 0
    assert len(json.loads((out / "scores.json").read_text())) == 12


@pytest.mark.realdata
def test_public_predictions_are_scored_whole(capsys):
    reference = DATA / "reference"
    if not reference.is_dir():
        pytest.skip(f"no public predictions in {reference}; set LRMT_DATA")
    records = score_folder(reference)
    assert len(records) == 3 * len(list(reference.rglob("*.csv")))
    assert {r["task"] for r in records} == {"qa1", "qa2", "qa3", "qa4", "qa5"}
    by_cell = {(r["task"], r["length_tokens"], r["variant"], r["rule"]): r["accuracy"] for r in records}
    # a target inside an answer is the least that official asks for
    assert all(by_cell[*key[:3], "contains"] >= value for key, value in by_cell.items() if key[3] == "official")
