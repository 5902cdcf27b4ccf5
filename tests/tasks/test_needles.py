import re

import pytest

from lrmt.errors import UsageError
from lrmt.tasks import babi
from lrmt.tasks.background import ProceduralProse
from lrmt.tasks.needles import OPPOSITE
from lrmt.tasks.registry import build_task

NAMES = ("niah_single", "memorize", "detect_memorize", "reasoning")
FACT = {
    "niah_single": re.compile(r" One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\."),
    "memorize": re.compile(rf" ({'|'.join(babi.PEOPLE)}) (?:{'|'.join(babi.GO)}) the (\w+)\."),
    "reasoning": re.compile(r" The (\w+) is (north|south|east|west) of the (\w+)\."),
}
FACT["detect_memorize"] = FACT["memorize"]


@pytest.fixture(scope="module")
def background(tokenizer):
    return ProceduralProse(tokenizer, num_sentences=600)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_exact_and_the_facts_answer(tokenizer, background, name):
    task = build_task(name, tokenizer, background=background, split="test", segment_length=160)
    targets = set()
    for index in range(30):
        example = task.example(index, 640)
        assert len(example.prompt_ids) + len(example.answer_ids) == 640
        assert len(example.answer_ids) <= task.max_new_tokens
        text = tokenizer.decode(example.prompt_ids)
        assert text.endswith(f" {example.question}")
        told = FACT[name].findall(text)
        targets.add(example.target)
        if name == "reasoning":
            way, middle = re.fullmatch(r"What is (\w+) of the (\w+)\?", example.question).groups()
            assert len(told) == 2 and {of for _, _, of in told} == {middle}
            assert told[0][1] == OPPOSITE[told[1][1]]
            assert [room for room, where, _ in told if where == way] == [example.target]
        else:
            ((key, value),) = told
            assert f" {key}" in example.question and value == example.target
    assert len(targets) >= 5


def test_the_needle_is_asked_for_as_ruler_does(tokenizer, background):
    text = tokenizer.decode(build_task("niah_single", tokenizer, background=background).example(0, 640).prompt_ids)
    assert text.startswith(" A special magic number is hidden within the following text.")
    (key,) = set(re.findall(r"[a-z]+-[a-z]+", text))
    assert text.endswith(f" The special magic number for {key} mentioned in the provided text is")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["niah_single", "detect_memorize", "reasoning", "qa1"])
def test_depth_places_the_first_fact(tokenizer, background, name, depth):
    task = build_task(name, tokenizer, background=background, depth=depth)
    for index in range(5):
        row = task.row(index, 6000)
        assert row.places[0] / row.num_tokens == pytest.approx(depth, abs=0.03)
        assert list(row.places) == sorted(row.places)


def test_memorize_has_its_fact_at_the_top_and_detect_anywhere(tokenizer, background):
    def places(name):
        task = build_task(name, tokenizer, background=background)
        return [task.row(index, 4000).places[0] for index in range(40)]

    assert set(places("memorize")) == {0}
    assert min(places("detect_memorize")) < 1000 and max(places("detect_memorize")) > 3000


def test_what_cannot_be_placed_is_refused(tokenizer, background):
    def make(name, length=1000, **options):
        return build_task(name, tokenizer, background=background, **options).example(0, length)

    for name, options, message in (
        ("memorize", {"depth": 0.5}, "--task memorize has its fact at the top; leave out --depth"),
        ("qa1", {"depth": 0.5, "task_end_pct": 0.7}, "--depth 0.5 says where .* leave out --task_start_pct 0.0"),
        ("qa1", {"depth": -0.1}, r"--depth must lie in \[0, 1\]"),
        ("niah_single", {"length": 50}, "niah_single does not fit into 50 tokens; give a length of"),
        ("niah_single", {"segment_length": 20}, "--segment_length 20 is too short"),
        (
            "qa1",
            {"background_dir": "books", "background_dataset": "org/books"},
            "--background_dir and --background_dataset exclude each other",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            make(name, **options)
