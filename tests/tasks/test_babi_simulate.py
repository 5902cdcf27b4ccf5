import collections
import functools
import random
import re

import pytest
from scipy.stats import chi2_contingency, chisquare

from lrmt.errors import UsageError
from lrmt.tasks import babi
from lrmt.tasks.babi import vocabulary, world

PLAUSIBLE = 1e-3  # p-value below which two samples count as different; seeds are fixed, so nothing flickers
WINDOW_TASKS = [f"qa{n}" for n in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13)]


def stories(samples):
    """Questions grouped by story: the facts of a story only grow."""
    told = []
    for sample in samples:
        if told and told[-1][-1].facts == sample.facts[: len(told[-1][-1].facts)]:
            told[-1].append(sample)
        else:
            told.append([sample])
    return told


def gaps(story):
    counts = [0, *(len(s.facts) for s in story)]
    return [b - a for a, b in zip(counts[:-1], counts[1:], strict=True)]


VERBS = {"GO": babi.GO, "GET": babi.GET, "DROP": babi.DROP, "GIVE": vocabulary.GIVE, "THEN": vocabulary.THEN}


@functools.cache
def kind(fact):
    return next(
        (name for name in ("GO", "GET", "DROP", "GIVE") if any(f" {verb} " in fact for verb in VERBS[name])), ""
    )


@functools.cache
def slots(task):
    """What matches a word that a story is free to choose, and the verb behind every wording."""
    words = vocabulary.words_of_files(task)
    names = [*words.people, *words.rooms, *words.objects, *words.species, *words.species.values(), *words.colours]
    names += [*words.shapes, *words.containers, *words.contents, *words.moods, "pajamas"]
    verbs = {wording: name for name, wordings in VERBS.items() for wording in wordings}
    longest_first = sorted([*names, *verbs], key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b", re.IGNORECASE), verbs


def pattern(task, text):
    """The text with verbs by kind, and every other chosen word by the order of its first mention."""
    matcher, verbs = slots(task)
    seen = {}
    return matcher.sub(lambda m: verbs.get(m[0]) or f"<{seen.setdefault(m[0].lower(), len(seen))}>", text)


# one value a story, so that values are independent
FEATURES = {
    "statements": lambda task, story: len(story[-1].facts),
    "questions": lambda task, story: len(story),
    "first gap": lambda task, story: gaps(story)[0],
    "last gap": lambda task, story: gaps(story)[-1],
    "answer": lambda task, story: story[-1].answer,
    "different questions": lambda task, story: len({s.question for s in story}),
    "question": lambda task, story: pattern(task, f"{story[-1].question} {story[-1].answer}"),
    "asked about": lambda task, story: story[-1].question,
    "first of support": lambda task, story: len(story[-1].facts) - story[-1].support[0],
    "last of support": lambda task, story: len(story[-1].facts) - story[-1].support[-1],
    "support": lambda task, story: len(story[-1].support),
    "first two statements": lambda task, story: pattern(task, " ".join(story[-1].facts[:2])),
    "last two statements": lambda task, story: pattern(task, " ".join(story[-1].facts[-2:])),
    "last statements and question": lambda task, story: pattern(
        task, " ".join([*story[-1].facts[-2:], story[-1].question])
    ),
    "three statements before": lambda task, story: pattern(task, " ".join(story[-1].facts[-5:-2])),
    "first word": lambda task, story: story[-1].facts[-1].split()[0],
    "last word": lambda task, story: story[-1].facts[-1].split()[-1],
    "verb": lambda task, story: next((v for vs in VERBS.values() for v in vs if v in story[-1].facts[-1]), ""),
}


def p_value(task, feature, told, other):
    """Chi-square of one count a story in two sets of stories; rare values are taken together."""
    one, two = (collections.Counter(FEATURES[feature](task, story) for story in side) for side in (told, other))
    rare = max(25, (len(told) + len(other)) / 200)
    table, rest = [], [0, 0]
    for value in sorted(one | two, key=str if isinstance(next(iter(one)), str) else None):
        row = [one[value] + rest[0], two[value] + rest[1]]
        if sum(row) < rare:
            rest = row
        else:
            table.append(row)
            rest = [0, 0]
    if sum(rest):
        table.append(rest)
    return chi2_contingency(table).pvalue if len(table) > 1 else 1.0


def differing(task, told, other):
    compared = {feature: p_value(task, feature, told, other) for feature in FEATURES}
    return {feature: p for feature, p in compared.items() if p < PLAUSIBLE}


@pytest.mark.realdata
@pytest.mark.parametrize("task", babi.SIMULATED)
def test_simulated_stories_are_distributed_like_the_files(task, simulated, official):
    found = differing(task, stories(simulated(task)), stories(official(task)))
    # the files of qa5 name Mary and the apple more often than chance allows, though not in their statements
    found.pop("answer" if task == "qa5" else None, None)
    assert found == {}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("task", "name", "value", "shows"),
    [
        ("qa1", "WINDOW", 8, "first of support"),
        ("qa5", "_GIVE_WEIGHT", {"qa5": 1.0}, "statements"),
        ("qa5", "_GIVE_ON", 1.0, "last two statements"),
        ("qa6", "_GET_THERE", {"qa6": 0.8}, "first two statements"),
    ],
)
def test_wrong_parameters_are_noticed(task, name, value, shows, official, monkeypatch):
    monkeypatch.setattr(world, name, value)
    assert shows in differing(task, stories(babi.simulate(task, 2000, seed=5)), stories(official(task)))


@pytest.mark.realdata
@pytest.mark.parametrize("task", babi.SIMULATED)
def test_vocabulary_and_answers_equal_those_of_the_files(task, simulated, official):
    def words(samples):
        sentences = {text for s in samples for text in (*s.facts, s.question, s.answer)}
        return set(re.findall(r"\w+|[.?]|\? $", " ".join(sentences)))

    def labels(samples):
        return {",".join(sorted(s.answer.split(","))) if task == "qa8" else s.answer for s in samples}

    assert words(simulated(task)) == words(official(task))
    assert {s.question.endswith("? ") for s in simulated(task)} == {s.question.endswith("? ") for s in official(task)}
    possible = labels(babi.BabiSample((), "", answer, ()) for answer in babi.answers(task))
    assert labels(simulated(task)) == possible >= labels(official(task))


# --- what the files say, for when they are not at hand ---------------------------------------------------------------

# statements a story, shares of go/get/drop/give, first gap 2 and 4, later gap 2
MOVING = {
    "qa2": (22.00, (0.650, 0.198, 0.152, 0), (0.052, 0.176), 0.713),
    "qa3": (74.2, (0.635, 0.190, 0.176, 0), (0.02, 0.04), 0.55),
    "qa5": (27.27, (0.559, 0.169, 0.117, 0.155), (0.047, 0.115), 0.873),
    "qa6": (10.31, (0.676, 0.210, 0.114, 0), (0.887, 0.099), 0.995),
    "qa7": (13.02, (0.596, 0.182, 0.093, 0.129), (0.498, 0.226), 0.964),
    "qa8": (13.34, (0.664, 0.211, 0.126, 0), (0.493, 0.230), 0.941),
}


@pytest.mark.parametrize("task", MOVING)
def test_moving_world_has_the_measured_shares(task, simulated):
    statements, kinds, first, later = MOVING[task]
    told = stories(simulated(task))
    assert sum(len(s[-1].facts) for s in told) / len(told) == pytest.approx(statements, rel=0.03)
    counted = collections.Counter(kind(fact) for story in told for fact in story[-1].facts)
    for name, share in zip(("GO", "GET", "DROP", "GIVE"), kinds, strict=True):
        assert counted[name] / counted.total() == pytest.approx(share, abs=0.012)
    for gap, share in zip((2, 4), first, strict=True):
        assert sum(gaps(s)[0] == gap for s in told) / len(told) == pytest.approx(share, abs=0.03)
    between = [gap for story in told for gap in gaps(story)[1:]]
    assert between.count(2) / len(between) == pytest.approx(later, abs=0.015)


LABELS = {
    "qa5": {"apple": 1 / 9, "football": 1 / 9, "milk": 1 / 9, **dict.fromkeys(("Bill", "Fred", "Jeff", "Mary"), 1 / 6)},
    "qa6": {"yes": 0.501},
    "qa7": {"one": 0.487, "none": 0.470, "two": 0.041},
    "qa8": {"nothing": 0.362, "milk": 0.191, "apple": 0.191, "football": 0.191},
    "qa9": {"no": 0.625, "yes": 0.375},
    "qa10": {"no": 0.475, "yes": 0.377, "maybe": 0.147},
    "qa17": {"yes": 0.497},
    "qa18": {"yes": 0.497},
    "qa19": {f"{a},{b}": 1 / 12 for a in "nesw" for b in "nesw" if a + b not in ("ns", "sn", "ew", "we")},
    "qa20": {"kitchen": 0.187, "garden": 0.094, "bedroom": 0.092}
    | dict.fromkeys(("hungry", "thirsty", "bored", "tired"), 0.157),
}


@pytest.mark.parametrize("task", LABELS)
def test_labels_have_the_measured_shares(task, simulated):
    labels = collections.Counter(sample.answer for sample in simulated(task))
    for label, share in LABELS[task].items():
        assert labels[label] / labels.total() == pytest.approx(share, abs=0.022)


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13", "qa14", "qa15", "qa16"])
def test_labels_are_uniform(task, simulated):
    # one question a story: answers within a story hang together
    labels = collections.Counter(story[-1].answer for story in stories(simulated(task)))
    assert set(labels) == set(babi.answers(task))
    assert chisquare(list(labels.values())).pvalue > PLAUSIBLE


@pytest.mark.parametrize("task", WINDOW_TASKS)
def test_questions_follow_pairs_of_statements_and_look_back_five(task, simulated):
    for story in stories(simulated(task)):
        assert len(story) == 5 and all(gap > 0 and gap % 2 == 0 for gap in gaps(story))
        for sample in story:
            recent = sample.support[-1] if task in ("qa7", "qa8", "qa11", "qa13") else sample.support[0]
            assert sample.question.endswith("? ")
            assert task == "qa8" or len(sample.facts) - recent <= 5


@pytest.mark.parametrize(
    ("task", "questions"), [("qa4", 1), ("qa14", 5), ("qa15", 4), ("qa16", 1), ("qa17", 8), ("qa19", 1)]
)
def test_questions_a_story(task, questions):
    rng = random.Random(0)
    assert {len(babi.simulate_story(task, rng)) for _ in range(200)} == {questions}


def test_stories_of_qa18_and_qa20_differ_in_length(simulated):
    counts = collections.Counter(len(story) for story in stories(simulated("qa18")))
    assert counts[5] / counts.total() > 0.97 and set(counts) <= set(range(5, 10)) and len(counts) > 2
    assert {len(story) for story in stories(simulated("qa20"))} == {9, 10, 11, 12}


def test_the_same_person_acts_again_more_often_after_a_get(simulated):
    """Whatever is impossible is drawn again from the person on: .25 after a move, .375 after a get."""
    again = collections.defaultdict(list)
    for story in stories(simulated("qa2")):
        facts = story[-1].facts
        for before, after in zip(facts[:-1], facts[1:], strict=True):
            again[kind(before)].append(before.split()[0] == after.split()[0])
    assert sum(again["GO"]) / len(again["GO"]) == pytest.approx(0.25, abs=0.012)
    assert sum(again["GET"]) / len(again["GET"]) == pytest.approx(0.375, abs=0.015)


# --- interface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_simulation_is_reproducible_and_seeded(task):
    assert babi.simulate(task, 20, 1) == babi.simulate(task, 20, 1) != babi.simulate(task, 20, 2)


def test_story_stops_at_the_wanted_question():
    whole = babi.simulate_story("qa17", random.Random(3))
    assert babi.simulate_story("qa17", random.Random(3), 3) == whole[:3]
    with pytest.raises(UsageError, match="cannot simulate 'qa21'"):
        babi.simulate("qa21", 1, 0)


def test_every_question_of_every_story_is_equally_likely():
    rng = random.Random(1)
    drawn = collections.Counter(len(babi.simulate_question("qa20", rng).facts) for _ in range(3000))
    every = collections.Counter(len(sample.facts) for sample in babi.simulate("qa20", 3000, 1))
    table = [[drawn[n] for n in range(1, 13)], [every[n] for n in range(1, 13)]]
    assert chi2_contingency(table).pvalue > PLAUSIBLE
