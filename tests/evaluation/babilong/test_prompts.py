"""Prompts: the template to the letter, and examples whose answers score."""

import json
import os
import re
from pathlib import Path

import pytest

from lrmt.evaluation.babilong.prompts import PARTS, PROMPTS, TEMPLATE, build_prompt, prompt_parts
from lrmt.evaluation.metrics import TASK_LABELS, score

DATA = Path(os.environ.get("LRMT_DATA", Path(__file__).parents[4] / "shared" / "data"))


def test_a_prompt_follows_the_template():
    prompt = build_prompt("qa1", " Some {text}.\n", "Where is Mary? ")
    head, tail = prompt.split("\n\n<context>\n")
    assert tail == "Some {text}.\n</context>\n\nQuestion: Where is Mary?"
    parts = PROMPTS["qa1"]
    assert head == f"{parts.instruction}\n\n{parts.examples}\n\n{parts.post_prompt}"
    assert prompt == TEMPLATE.format(context="Some {text}.", question="Where is Mary?", **prompt_parts("qa1"))


def test_parts_can_be_left_out():
    bare = "<context>\nText.\n</context>\n\nQuestion: Where?"
    assert build_prompt("qa1", "Text.", "Where?", parts=()) == bare
    assert build_prompt("passkey", "Text.", "Where?") == bare
    only = build_prompt("qa1", "Text.", "Where?", parts=["post_prompt"])
    assert only == f"{PROMPTS['qa1'].post_prompt}\n\n{bare}"
    assert prompt_parts("qa1", ["examples"]) == {
        "instruction": "",
        "examples": PROMPTS["qa1"].examples,
        "post_prompt": "",
    }
    with pytest.raises(ValueError, match="chat_template"):
        build_prompt("qa1", "Text.", "Where?", parts=["chat_template"])


def test_every_task_has_wording_of_its_own():
    assert set(PROMPTS) == set(TASK_LABELS)
    assert len({prompt.instruction for prompt in PROMPTS.values()}) >= 18  # qa1 and qa6, qa4 and qa19 ask of one world
    assert all(prompt_parts(task)[part] for task in PROMPTS for part in PARTS)
    assert PROMPTS["qa1"].examples.count("<example>") == PROMPTS["qa1"].examples.count("</example>") == 2


@pytest.mark.parametrize("task", PROMPTS)
def test_examples_are_two_and_their_answers_score(task):
    samples = PROMPTS[task].samples
    assert len(samples) == 2 and len({answer for _, _, answer in samples}) == 2
    for statements, question, answer in samples:
        assert score(answer, answer, question, task, "strict")
        assert statements.endswith(".") and question.endswith("?")
        if set(TASK_LABELS[task]) <= {"yes", "no", "maybe", "none", "one", "two", "three"} or task in (
            "qa19",
            "qa8",
            "qa15",
            "qa20",
        ):
            continue
        assert answer.lower() in statements.lower()  # the answer is to be read, not guessed


@pytest.mark.realdata
def test_the_wording_is_our_own():
    files = sorted((DATA / "reference").rglob("*_instruction_yes_*.json"))
    if not files:
        pytest.skip(f"no public prompts in {DATA / 'reference'}; set LRMT_DATA")

    def runs_of_words(text, n=7):
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

    public = set()
    for file in files:
        prompt = json.loads(file.read_text())["prompt"]
        public |= runs_of_words(" ".join(prompt[part] for part in PARTS if part != "examples"))
    assert public
    for task, prompt in PROMPTS.items():
        assert not public & (runs_of_words(prompt.instruction) | runs_of_words(prompt.post_prompt)), task
