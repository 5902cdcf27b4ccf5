"""`lrmt report`: rows, columns, published figures, and what is refused."""

import csv
import json

import pytest

from lrmt import cli
from lrmt.errors import UsageError
from lrmt.evaluation.babilong.published import LENGTHS, MEAN, PAPERS, ROWS
from lrmt.evaluation.report import find_column, run_report
from lrmt.evaluation.results import build_record
from lrmt.files import to_json

QA = ("qa1", "qa2", "qa3", "qa4", "qa5")
BARE, FULL = (f"instruction_{x}_examples_{x}_post_prompt_{x}" for x in ("no", "yes"))


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(records))
    return path


def evaluated(*cells, model="rmt"):
    return [build_record(model, task, tokens, 1, right, 10) for task, tokens, right in cells]


def scored(model, variant, rule, *cells):
    return [record | {"variant": variant, "rule": rule} for record in evaluated(*cells, model=model)]


def read_table(folder):
    """Rows of report.csv by (task, model): the figures by length."""
    with open(folder / "report.csv", newline="") as stream:
        return {(row["task"], row["model"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(stream)}


@pytest.fixture
def runs(tmp_path):
    small = evaluated(("qa1", 3960, 9), ("qa1", 96, 10), ("passkey", 96, 5)) + evaluated(
        ("qa1", 96, 2), model="backbone"
    )
    write(tmp_path / "small" / "evaluation" / "results.json", small)
    write(tmp_path / "large" / "results.json", evaluated(("qa1", 4100, 7)))
    return tmp_path


def test_models_stand_side_by_side_with_published_rows(runs, capsys):
    run_report([runs / "small" / "evaluation", runs / "large" / "results.json"], output_dir=runs / "out")
    assert sorted(path.name for path in (runs / "out").iterdir()) == ["report.csv", "report.md", "report.png"]
    assert (runs / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    table = read_table(runs / "out")
    assert list(table)[:5] == [
        ("passkey", "small rmt"), ("qa1", "small rmt"), ("qa1", "small backbone"), ("qa1", "large rmt"),
        ("qa1", "RMT 137M, published"),
    ]  # fmt: skip
    assert {task for task, _ in table} == {"passkey", "qa1"}  # no reference row of a task that was not measured
    assert table["qa1", "small rmt"]["4000"] == "90" and table["qa1", "large rmt"]["4000"] == "70"
    assert table["qa1", "small rmt"]["96"] == "100" and "96" not in table["qa1", "large rmt"]
    assert table["qa1", "small rmt"]["source"] == "measured"
    reference = table["qa1", "RMT-R 137M, published"]
    assert (reference["source"], reference["16000"], reference["10000000"]) == ("arXiv:2402.10790", "99.9", "86")
    markdown = (runs / "out" / "report.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "| task | model | 96 | 4k | 16k |" in markdown
    assert "| qa1 | *RMT 137M, published* |  | 100 | 100 | 99 |" in markdown
    assert all(paper in markdown for paper in PAPERS.values())


def test_names_tasks_and_no_published(runs):
    paths = [runs / "small" / "evaluation" / "results.json", runs / "large"]
    options = {"names": ["A", "B"], "task": ["qa1"], "no_published": True, "output_dir": runs / "out"}
    run_report(paths, **options)
    assert list(read_table(runs / "out")) == [("qa1", "A rmt"), ("qa1", "A backbone"), ("qa1", "B rmt")]
    run_report(paths, names=["A", "B"], task=["passkey"], output_dir=runs / "other")
    assert list(read_table(runs / "other")) == [("passkey", "A rmt")]
    assert "arXiv" not in (runs / "other" / "report.md").read_text()


def test_scored_folders_show_one_rule_and_tell_prompts_apart(tmp_path):
    cells = [("qa1", 0, 10), ("qa1", 4000, 5)]
    records = scored("org/m", FULL, "official", *cells) + scored("org/m", FULL, "contains", ("qa1", 4000, 8))
    write(tmp_path / "one" / "scores.json", records)
    write(tmp_path / "two" / "scores.json", records + scored("org/m", BARE, "official", ("qa1", 4000, 1)))
    run_report([tmp_path / "one", tmp_path / "two"], names=["one", "two"], output_dir=tmp_path / "out")
    table = read_table(tmp_path / "out")
    assert table["qa1", "one"]["0"] == "100" and table["qa1", "one"]["4000"] == "50"
    assert table["qa1", "two (instruction + examples + post prompt)"]["4000"] == "50"
    assert table["qa1", "two (question only)"]["4000"] == "10"
    run_report([tmp_path / "one"], scoring="contains", output_dir=tmp_path / "other")
    assert read_table(tmp_path / "other")["qa1", "org/m"]["4000"] == "80"
    write(tmp_path / "three" / "scores.json", records + scored("org/n", FULL, "official", ("qa1", 4000, 3)))
    for names, models in (([], ["org/m", "org/n"]), (["3"], ["3 org/m", "3 org/n"])):
        run_report([tmp_path / "three"], names=names, no_published=True, output_dir=tmp_path / "out", overwrite=True)
        table = read_table(tmp_path / "out")
        assert [table["qa1", model]["4000"] for model in models] == ["50", "30"] and len(table) == 2


def test_results_of_another_rule_say_so(runs):
    (runs / "large" / "settings.json").write_text(json.dumps({"scoring": "strict"}))
    write(runs / "large" / "results.json", evaluated(("qa1", 96, 7), ("passkey", 96, 7)))
    run_report([runs / "large"], no_published=True, output_dir=runs / "out")
    assert list(read_table(runs / "out")) == [("passkey", "large rmt"), ("qa1", "large rmt (strict)")]
    run_report([runs / "large"], no_published=True, scoring="strict", output_dir=runs / "out", overwrite=True)
    assert ("qa1", "large rmt") in read_table(runs / "out")


def test_the_mean_over_five_tasks_needs_all_five(tmp_path):
    cells = [(task, 4000, right) for task, right in zip(QA, (10, 9, 8, 7, 4), strict=True)] + [("qa1", 16000, 9)]
    write(tmp_path / "results.json", evaluated(*cells))
    run_report([tmp_path], names=["mine"], output_dir=tmp_path / "out")
    table = read_table(tmp_path / "out")
    mean = table[MEAN, "mine rmt"]
    assert mean["4000"] == "76" and "16000" not in mean
    assert table[MEAN, "GPT-4, published"]["4000"] == "74"


def test_two_texts_near_one_length_keep_a_column_each(tmp_path):
    write(tmp_path / "results.json", evaluated(("qa1", 3936, 3), ("qa1", 4032, 4), ("qa1", 8064, 8)))
    run_report([tmp_path], names=["mine"], no_published=True, output_dir=tmp_path / "out")
    row = read_table(tmp_path / "out")["qa1", "mine rmt"]
    assert (row["3936"], row["4000"], row["8000"]) == ("30", "40", "80")
    assert [find_column(n) for n in (0, 96, 3799, 3800, 126_976, 1_010_000)] == [0, 96, 3799, 4000, 128_000, 1_000_000]


def test_depths_are_averaged_and_a_failed_one_fails_the_cell(tmp_path):
    def at_depths(tokens, *rights, n=10):
        cells = [build_record("rmt", "qa1", tokens, 1, right, n) for right in rights]
        return [cell | {"depth": depth / 2} for depth, cell in enumerate(cells)]

    failed = [r | dict.fromkeys(("accuracy", "ci_low", "ci_high")) | {"error": "x"} for r in at_depths(16000, 0)]
    records = at_depths(4000, 10, 1, 4) + failed + [r | {"depth": 1.0} for r in at_depths(16000, 7)]
    write(tmp_path / "results.json", records)
    (series, *_) = run_report([tmp_path], names=["mine"], no_published=True, output_dir=tmp_path / "out")
    assert "| qa1 | mine rmt | 50 | failed |" in (tmp_path / "out" / "report.md").read_text()
    assert "of several depths the mean" in (tmp_path / "out" / "report.md").read_text()
    assert series.cells["qa1", 4000] == build_record("rmt", "qa1", 4000, 1, 15, 30)  # the interval of all answers


def test_a_length_that_was_asked_for_by_name_has_its_column(tmp_path):
    short = evaluated(("qa1", 3584, 6))[0] | {"length": "4k"}  # whole segments of 512
    write(tmp_path / "results.json", [short, *evaluated(("qa1", 4096, 7))])
    run_report([tmp_path], names=["mine"], output_dir=tmp_path / "out")
    row = read_table(tmp_path / "out")["qa1", "mine rmt"]
    assert (row["4000"], row["4096"]) == ("60", "70")
    write(tmp_path / "bad" / "results.json", [short | {"length": "4q"}])
    with pytest.raises(UsageError, match="record 1: length '4q' is no length"):
        run_report([tmp_path / "bad"], output_dir=tmp_path / "out", overwrite=True)


def test_a_failed_cell_is_marked(tmp_path):
    failed = evaluated(("qa1", 4000, 1))[0] | {"accuracy": None, "ci_low": None, "ci_high": None}
    write(tmp_path / "results.json", [failed, *evaluated(("qa1", 16000, 5))])
    run_report([tmp_path], names=["api"], no_published=True, output_dir=tmp_path / "out")
    assert "| qa1 | api rmt | failed | 50 |" in (tmp_path / "out" / "report.md").read_text()


def test_published_figures_are_whole():
    """Sums over the table of the papers, so that no figure is mistyped unseen."""
    assert {len(figures) for *_, figures in ROWS} == {len(LENGTHS)}
    assert {paper for _, paper, _, _ in ROWS} == set(PAPERS)
    sums = {(model, task): sum(x for x in figures if x is not None) for model, _, task, figures in ROWS}
    assert len(sums) == len(ROWS) == 15
    assert [sums["RMT 137M", task] for task in QA] == [726, 438, 361, 381, 634]
    assert [sums["ARMT 137M", task] for task in QA[:4]] == [787, 782, 640, 792]
    assert sums["RMT-R 137M", "qa1"] == pytest.approx(779.9)
    assert [sums[m, MEAN] for m in ("GPT-4", "Mistral-7B-v0.2", "ChatQA + RAG")] == [270, 128, 340]
    assert [sums[f"GPT-4 + RAG by {unit}", "qa1"] for unit in ("sentence", "segment")] == [187, 98]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ("{}", "no list of records"),
        ("[]", "no record yet"),
        ('[{"model": "m", "task": "qa1", "length_tokens": 1, "perplexity": 9.0}]', "record 1 has no 'accuracy'"),
        ('[{"model": "m", "task": "qa1", "length_tokens": 1, "accuracy": 90}]', "accuracy 90 is not in 0..1"),
        ('[{"model": "m", "task": "qa1", "length_tokens": "4k", "accuracy": 0.9}]', "length_tokens '4k' is no number"),
        ('[{"model": "m", "task": "qa21", "length_tokens": 1, "accuracy": 0.9}]', "'qa21' is unknown"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(path), "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert str(path) in error and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("small/evaluation nowhere.json", "nowhere.json cannot be read"),
        ("small", "holds no results.json or scores.json; lrmt evaluate or score writes one; it holds: evaluation"),
        ("large large", "call their models 'large rmt'; give --names"),
        ("large --names a b", "--names takes one name for each path; got 2 for 1"),
        ("large --task qa2", "--task qa2 is in none of large"),
        ("large --task qa1_5", "--task must be one of"),
        ("large --scoring oficial", "did you mean official?"),
        ("large --output_dir large/results.json", "--output_dir must be a folder"),
    ],
)
def test_bad_input_is_one_line(runs, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert message in error
    assert sorted(runs.rglob("*")) == before
