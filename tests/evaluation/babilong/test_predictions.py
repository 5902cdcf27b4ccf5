"""Submission files: names, what is written and read back, and what is refused."""

import csv
import json

import pytest

from lrmt.errors import UsageError
from lrmt.evaluation.babilong.predictions import (
    Predictions,
    build_variant,
    describe_variant,
    find_predictions,
    read_predictions,
    write_predictions,
)
from lrmt.lengths import parse_tokens

VARIANT = build_variant(["instruction", "examples", "post_prompt"])
STEM = "qa1_4k_instruction_yes_examples_yes_post_prompt_yes_chat_template_no"
ROWS = [
    ("kitchen", 'in the "kitchen", I think.\nOr so', "Where is Mary? "),
    ("office", "", "Where is John? "),
    ("garden", "the garden\r\n", "Where is Zoë? "),
]


def cell(**changes):
    return Predictions(
        **{"model": "org/name", "task": "qa1", "length": "4k", "variant": VARIANT, "rows": ROWS} | changes
    )


def test_a_cell_reads_back_as_it_was_written(tmp_path):
    path = write_predictions(tmp_path, cell(), {"instruction": "Read."}, {"max_new_tokens": 20})
    assert path == tmp_path / "org" / "name" / f"{STEM}.csv"
    assert find_predictions(tmp_path) == [path]
    assert read_predictions(path) == cell()
    with open(path, newline="") as stream:
        lines = list(csv.reader(stream))
    assert lines[0] == ["", "target", "output", "question"]
    assert [line[0] for line in lines[1:]] == ["0", "1", "2"]
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside == {"prompt": {"instruction": "Read."}, "generate_kwargs": {"max_new_tokens": 20}}
    assert len(list(path.parent.iterdir())) == 2  # no temporary file is left


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "org" / "name" / f"{STEM}.csv"
    path.parent.mkdir(parents=True)
    path.write_text("target,output,question\nkitchen,the kitchen,Where?\n", encoding="utf-8-sig")
    assert read_predictions(path).rows == [("kitchen", "the kitchen", "Where?")]


@pytest.mark.parametrize(
    ("model", "folder"), [("gpt", "local/gpt"), ("org/a/b", "org/a_b"), ("meta/llama-3.1", "meta/llama-3.1")]
)
def test_models_have_an_organisation_and_a_name(tmp_path, model, folder):
    path = write_predictions(tmp_path, cell(model=model), {}, {})
    assert path.parent == tmp_path / folder
    assert read_predictions(path).model == folder


def test_a_failed_cell_or_an_unreadable_name_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="an output is None"):
        write_predictions(tmp_path, cell(rows=[("kitchen", None, "Where?")]), {}, {})
    with pytest.raises(ValueError, match="no name of a cell"):
        write_predictions(tmp_path, cell(length="4K"), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_names_of_lengths_and_prompts():
    assert [parse_tokens(length) for length in ("0k", "4k", "128k", "10M")] == [0, 4_000, 128_000, 10_000_000]
    assert build_variant([]) == "instruction_no_examples_no_post_prompt_no_chat_template_no"
    assert describe_variant(build_variant([])) == "question only"
    assert describe_variant("instruction_yes_examples_no_post_prompt_yes") == "instruction + post prompt"
    with pytest.raises(ValueError, match="postprompt"):
        build_variant(["postprompt"])


def test_files_come_in_the_order_of_tasks_and_lengths(tmp_path):
    for task, length in [("qa10", "4k"), ("qa2", "1M"), ("qa2", "16k"), ("qa2", "4k")]:
        write_predictions(tmp_path, cell(task=task, length=length), {}, {})
    assert [path.name.split("_i")[0] for path in find_predictions(tmp_path)] == [
        "qa2_4k",
        "qa2_16k",
        "qa2_1M",
        "qa10_4k",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b",target,output,question\n", "no rows"),
        (b",target,answer,question\n0,kitchen,kitchen,Where?\n", "no column 'output'; .* found: \\(unnamed\\), target, answer"),
        (b",target,output,question\n0,kitchen,kitchen\n", "row 1 has 3 fields, the header 4"),
        (b",target,output,question\n0,kitchen,kitchen,Where?\n1,cellar,kitchen,Where?\n", "row 2: target 'cellar' is no answer"),
        (b',target,output,question\n0,kitchen,"the kit', "cannot be read as CSV"),
        (b",target,output,question\n0,kitchen,\xff,Where?\n", "not UTF-8"),
        (b"\x89PNG\x00\x00\x01", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(tmp_path, content, message):
    path = tmp_path / f"{STEM}.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refusal:
        read_predictions(path)
    assert path.name in str(refusal.value)
    assert "\n" not in str(refusal.value)
