import collections
import re

import pytest
from scipy.stats import chi2_contingency, chisquare

from lrmt.errors import UsageError
from lrmt.tasks import babi

STORIES = 4000
PLAUSIBLE = 1e-3  # p-value below which two samples count as different; seeds are fixed, so nothing flickers


@pytest.fixture(scope="module")
def simulated():
    return {task: babi.simulate(task, STORIES, seed=5) for task in babi.SIMULATED}


@pytest.fixture(scope="module")
def official(data_dir):
    return {
        task: [s for split in ("train", "valid") for s in babi.read(data_dir / "babi" / f"{task}_{split}.txt")]
        for task in babi.SIMULATED
    }


def stories(samples):
    return [samples[i : i + 5] for i in range(0, len(samples), 5)]


def gaps(story):
    counts = [0, *(len(s.facts) for s in story)]
    return [b - a for a, b in zip(counts[:-1], counts[1:], strict=True)]


def kind(fact):
    match = babi._STATEMENT.fullmatch(fact)
    return next(name for name in ("go", "get", "drop") if match[name])


def later_moves(sample):
    """Moves of the carrier after the one into the room of a qa3 question, while the object is carried."""
    touch, arrival, _ = sample.support
    end = touch if kind(sample.facts[touch]) == "drop" else len(sample.facts)
    carrier = sample.facts[touch].split()[0]
    return sum(fact.startswith(carrier) and kind(fact) == "go" for fact in sample.facts[arrival + 1 : end])


def vocabulary(samples):
    sentences = {text for s in samples for text in (*s.facts, s.question, s.answer)}
    return set(re.findall(r"\w+|[.?]", " ".join(sentences)))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_read_drops_questions_and_maps_support_to_facts(tmp_path):
    path = tmp_path / "qa2_train.txt"
    path.write_text(
        "1 Mary moved to the office.\n2 Mary got the milk there.\n3 Where is Mary? \toffice\t1\n"
        "4 Mary dropped the milk.\n5 Where is the milk? \toffice\t4 1\n"
        "1 John went to the garden.\n2 Where is John? \tgarden\t1\n"
    )
    first, second, third = babi.read(path)
    assert first == babi.BabiSample(
        ("Mary moved to the office.", "Mary got the milk there."), "Where is Mary? ", "office", (0,)
    )
    assert second.facts == (*first.facts, "Mary dropped the milk.")
    assert second.support == (2, 0)
    assert third == babi.BabiSample(("John went to the garden.",), "Where is John? ", "garden", (0,))


def test_read_refuses_what_is_no_babi_file(tmp_path):
    (tmp_path / "qa7_train.txt").write_text("")
    with pytest.raises(UsageError, match="holds: qa7_train.txt"):
        babi.read(tmp_path / "qa1_train.txt")
    with pytest.raises(UsageError, match="holds no question"):
        babi.read(tmp_path / "qa7_train.txt")
    for text, message in (
        ("Call me Ishmael.", r"bad.txt:1: expected `<id> <sentence>`"),
        ("1 Mary went to the office.\n2 Where is Mary? \toffice\t7", r"bad.txt:2: expected `question<TAB>answer"),
        ("1 Mary went to the office.\n2 Where is Mary? \toffice", r"bad.txt:2: expected `question<TAB>answer"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(UsageError, match=message):
            babi.read(tmp_path / "bad.txt")


@pytest.mark.realdata
def test_read_finds_every_question_of_every_official_task(data_dir):
    for number in range(1, 21):
        samples = babi.read(data_dir / "babi" / f"qa{number}_valid.txt")
        assert len(samples) == (data_dir / "babi" / f"qa{number}_valid.txt").read_text().count("?")
        assert all(s.answer and s.facts and max(s.support) < len(s.facts) for s in samples)


# --- solving ---------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.parametrize("task", babi.SIMULATED)
def test_solver_agrees_with_every_official_question(task, official):
    assert len(official[task]) == (2000 if task == "qa3" else 10000)
    for sample in official[task]:
        assert babi.solve(sample.facts, sample.question, task) == (sample.answer, sample.support)


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_solver_agrees_with_the_simulator(task, simulated):
    for sample in simulated[task][:4000]:
        assert babi.solve(sample.facts, sample.question, task) == (sample.answer, sample.support)


def test_solver_on_stories_worked_by_hand():
    assert babi.solve(
        ["Mary went to the office.", "John moved to the garden.", "Mary went back to the hallway."],
        "Where is Mary? ",
        "qa1",
    ) == ("hallway", (2,))
    carried = [
        "Mary got the milk there.",
        "Mary went to the office.",
        "Mary left the milk.",
        "Mary went to the garden.",
    ]
    assert babi.solve(carried, "Where is the milk? ", "qa2") == ("office", (2, 1))
    held = [*carried[:2], "John took the apple there.", "Mary moved to the kitchen."]
    assert babi.solve(held, "Where is the milk? ", "qa2") == ("kitchen", (0, 3))
    recurring = ["Mary took the milk.", *(f"Mary went to the {r}." for r in ("office", "garden", "hallway", "garden"))]
    assert babi.solve(recurring, "Where was the milk before the garden? ", "qa3") == ("hallway", (0, 4, 3))


@pytest.mark.parametrize(
    ("task", "facts", "question"),
    [
        ("qa1", ["John went to the garden."], "Where is Mary?"),
        ("qa2", ["John went to the garden."], "Where is the milk?"),
        ("qa2", ["John got the milk there."], "Where is the milk?"),
        ("qa3", ["John got the milk.", "John went to the garden."], "Where was the milk before the garden?"),
        ("qa1", ["John danced in the garden."], "Where is John?"),
        ("qa1", ["John went to the garden."], "Who is John?"),
    ],
)
def test_solver_refuses_what_the_story_does_not_say(task, facts, question):
    with pytest.raises(ValueError):
        babi.solve(facts, question, task)


# --- simulating ------------------------------------------------------------------------------------------------------


def test_simulation_is_reproducible_and_seeded():
    assert babi.simulate("qa3", 30, 1) == babi.simulate("qa3", 30, 1)
    assert babi.simulate("qa3", 30, 1) != babi.simulate("qa3", 30, 2)
    with pytest.raises(UsageError, match="cannot simulate 'qa4'.*--babi_dir"):
        babi.simulate("qa4", 1, 0)


@pytest.mark.parametrize(("task", "word_types"), [("qa1", 19), ("qa2", 33), ("qa3", 34)])
def test_simulated_vocabulary_has_the_published_size(task, word_types, simulated):
    assert len({w.lower() for w in vocabulary(simulated[task]) - {".", "?"}}) == word_types


@pytest.mark.realdata
@pytest.mark.parametrize("task", babi.SIMULATED)
def test_simulated_vocabulary_equals_the_files(task, simulated, official):
    assert vocabulary(simulated[task]) == vocabulary(official[task])


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_cadence_and_window(task, simulated):
    for story in stories(simulated[task]):
        assert all(gap > 0 and gap % 2 == 0 for gap in gaps(story))
        assert all(s.question.endswith("? ") and len(s.facts) - s.support[0] <= 5 for s in story)


# measured on the files: statements a story, shares of move/get/drop, later gaps 2/4/6/8, questions about dropped things
MEASURED = {
    "qa2": (22.00, (0.650, 0.198, 0.152), (0.713, 0.147, 0.071, 0.033), 0.687),
    "qa3": (74.2, (0.635, 0.190, 0.176), (0.55, 0.06, 0.05, 0.04), 0.79),
}


@pytest.mark.parametrize("task", MEASURED)
def test_simulated_shares_match_the_measured_ones(task, simulated):
    statements, kinds, later, dropped = MEASURED[task]
    told = stories(simulated[task])
    assert sum(len(s[-1].facts) for s in told) / STORIES == pytest.approx(statements, rel=0.03)
    counted = collections.Counter(kind(fact) for story in told for fact in story[-1].facts)
    for name, share in zip(("go", "get", "drop"), kinds, strict=True):
        assert counted[name] / counted.total() == pytest.approx(share, abs=0.006)
    between = collections.Counter(gap for story in told for gap in gaps(story)[1:])
    for gap, share in zip((2, 4, 6, 8), later, strict=True):
        assert between[gap] / between.total() == pytest.approx(share, abs=0.013)
    about_dropped = sum(kind(s.facts[s.support[0]]) == "drop" for s in simulated[task])
    assert about_dropped / len(simulated[task]) == pytest.approx(dropped, abs=0.02)


def test_qa2_first_gap_matches_the_measured_one(simulated):
    first = collections.Counter(gaps(story)[0] for story in stories(simulated["qa2"]))
    expected = [0.052, 0.176, 0.180, 0.165, 0.119]
    observed = [first[gap] for gap in (2, 4, 6, 8, 10)]
    expected, observed = [*expected, 1 - sum(expected)], [*observed, STORIES - sum(observed)]
    # the measured shares themselves come from 2,000 stories
    table = [observed, [round(2000 * share) for share in expected]]
    assert chi2_contingency(table).pvalue > PLAUSIBLE


def test_qa2_restarts_at_the_person(simulated):
    """The same person acts again with probability .25 after a move but .375 after a get."""
    again = collections.defaultdict(list)
    for story in stories(simulated["qa2"]):
        facts = story[-1].facts
        for before, after in zip(facts[:-1], facts[1:], strict=True):
            again[kind(before)].append(before.split()[0] == after.split()[0])
    assert sum(again["go"]) / len(again["go"]) == pytest.approx(0.25, abs=0.012)
    assert sum(again["get"]) / len(again["get"]) == pytest.approx(0.375, abs=0.012)


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_words_are_uniform(task, simulated):
    facts = [fact for story in stories(simulated[task]) for fact in story[-1].facts]
    for words in (babi.PEOPLE, babi.GO, babi.GET, babi.DROP):
        if task == "qa1" and words in (babi.GET, babi.DROP):
            continue
        counts = [sum(f" {word} " in f" {fact}" for fact in facts) for word in words]
        assert max(counts) / min(counts) < 1.06
    # one question a story: answers within a story hang together
    labels = collections.Counter(story[-1].answer for story in stories(simulated[task]))
    assert set(labels) == set(babi.ROOMS)
    assert chisquare(list(labels.values())).pvalue > PLAUSIBLE


def test_there_follows_get_and_drop_as_measured(simulated):
    for task, get_share in (("qa2", 1.0), ("qa3", 0.2)):
        facts = [fact for story in stories(simulated[task]) for fact in story[-1].facts]
        for name, share in (("get", get_share), ("drop", 0.2), ("go", 0.0)):
            there = [fact.endswith(" there.") for fact in facts if kind(fact) == name]
            assert sum(there) / len(there) == pytest.approx(share, abs=0.01)


@pytest.mark.realdata
@pytest.mark.parametrize("task", babi.SIMULATED)
def test_simulated_stories_are_distributed_like_the_files(task, simulated, official):
    """Chi-square of one count a story (so that counts are independent): lengths, first gap, what is asked about."""

    def compare(count, edges):
        tables = [
            collections.Counter(sum(count(story) >= edge for edge in edges) for story in stories(samples))
            for samples in (simulated[task], official[task])
        ]
        bins = sorted(set(tables[0]) | set(tables[1]))
        if len(bins) == 1:
            return
        assert chi2_contingency([[table[b] for b in bins] for table in tables]).pvalue > PLAUSIBLE

    compare(lambda story: gaps(story)[0], range(2, 60, 8 if task == "qa3" else 2))
    compare(lambda story: len(story[-1].facts), range(10, 160, 20 if task == "qa3" else 6))
    compare(lambda story: len(story[-1].facts) - story[-1].support[0], range(2, 6))
    compare(lambda story: story[-1].facts[-5:].count(story[-1].facts[-1]), range(1, 6))
    compare(lambda story: sum(story[-1].question.split()[2].strip("?") in f for f in story[-1].facts[-5:]), range(1, 6))
    if task == "qa3":
        compare(lambda story: story[-1].support[1] - story[-1].support[2], (2, 3, 5, 8, 13))
        compare(lambda story: later_moves(story[-1]), (1, 2, 3))
    elif task == "qa2":
        compare(lambda story: story[-1].support[0] - story[-1].support[1], (-8, -3, 1, 3, 6, 10))
