import json

import pytest

from lrmt.errors import UsageError
from lrmt.tasks import babi
from lrmt.tasks.babi import vocabulary

WORDS = {
    "people": {"Ann": "she", "Bo": "he", "Cleo": "she", "Dov": "he", "Edda": "she", "Finn": "he"},
    "rooms": ["attic", "cellar", "dining room", "loft", "porch", "study", "well-house"],
    "objects": ["lamp", "tea pot", "umbrella", "vase"],
    "species": {"ox": "oxen", "hen": "hens", "owl": "owls", "pike": "pike", "fly": "flies"},
    "colours": ["pink", "blue"],
    "shapes": ["green cone", "disc", "ring", "blue cone"],
    "containers": ["bag", "crate", "trunk"],
    "contents": ["bar of soap", "pea"],
    "moods": {"sleepy": ["loft", "quilt"], "cold": ["cellar", "coal"], "glad": ["porch", "vase"]},
}

PAIRS = ("people", "species", "moods")


@pytest.fixture(scope="module")
def words():
    return babi.Vocabulary(**WORDS)


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_other_words_tell_the_same_kind_of_story(task, words):
    samples = babi.simulate(task, 60, 0, words)
    texts = {text for sample in samples for text in (*sample.facts, sample.question)}
    own = {word for text in texts for word in text.lower().strip(" .?").split()}
    files = {
        word
        for sample in babi.simulate(task, 60, 0)
        for text in (*sample.facts, sample.question)
        for word in text.lower().strip(" .?").split()
    }
    given = {w for group in WORDS.values() for key in group for w in key.lower().split()}
    given |= {w for plural in WORDS["species"].values() for w in plural.split()}
    given |= {w for pair in WORDS["moods"].values() for word in pair for w in word.split()}
    assert own - files <= given | {"an"} and own & given
    assert not own & {"mary", "john", "kitchen", "office", "milk", "wolf", "white", "triangle", "suitcase", "hungry"}
    answers = {",".join(sorted(a.split(","))) for a in babi.answers(task, words)}
    for sample in samples:
        answer, support = babi.solve(sample.facts, sample.question, task, words)
        assert task == "qa5" or answer == sample.answer
        assert task in ("qa5", "qa18") or support == sample.support
        assert ",".join(sorted(sample.answer.split(","))) in answers


def test_what_a_file_leaves_out_stays(tmp_path):
    path = tmp_path / "words.yaml"
    path.write_text("rooms: [attic, cellar, loft, porch, study, yard]\n")
    read = babi.Vocabulary.load(path)
    (sample, *_) = babi.simulate("qa1", 1, 0, read)
    assert sample.answer in ("attic", "cellar", "loft", "porch", "study", "yard")
    assert sample.facts[0].split()[0] in babi.PEOPLE
    path.write_text(json.dumps(WORDS))
    assert babi.simulate("qa3", 2, 0, babi.Vocabulary.load(path)) == babi.simulate(
        "qa3", 2, 0, babi.Vocabulary(**WORDS)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rooms: [attic", "is not YAML in line"),
        ("- attic", "holds .*write keys such as people"),
        ("", "holds None"),
        ("room: [attic, cellar]", "has the key 'room'.*did you mean rooms"),
        ("people: [Ann, Bo]", "has people: .*write people: {Ann: she"),
        ("people: {Ann: they, Bo: he}", "has people: .*write people"),
        ("people: {Ann Lee: she, Bo: he}", "has 'Ann Lee' among its people; use letters"),
        ("rooms: []", r"has rooms: \[\]"),
        ("rooms: [attic, 7]", "has 7 among its rooms"),
        ("rooms: [attic, the cellar]", "has 'the cellar' among its rooms; leave out the words of the grammar"),
        ("rooms: [attic, Attic]", "has the same word twice in rooms"),
        ("moods: {sad: loft}", "has moods: .*write moods"),
        ("objects: [a, b, c, d, e, f, g, h, i, j, k]", "gives 11 objects; stories count up to ten"),
    ],
)
def test_bad_vocabularies_end_in_one_line(tmp_path, text, message):
    path = tmp_path / "words.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"--babi_vocabulary .*{message}") as caught:
        babi.Vocabulary.load(path)
    assert "\n" not in str(caught.value)


def test_too_few_words_and_no_file_end_in_one_line(tmp_path):
    few = babi.Vocabulary(people={"Ann": "she", "Bo": "he", "Cleo": "she"})
    assert len(babi.simulate("qa1", 1, 0, few)) == 5
    with pytest.raises(UsageError, match="--babi_vocabulary gives 3 people; qa16 needs 5 or more"):
        babi.simulate("qa16", 1, 0, few)
    with pytest.raises(UsageError, match="--babi_vocabulary .*nowhere.yaml is no file"):
        babi.Vocabulary.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_the_fewest_words_suffice(task):
    fewest = {"contents": 1} | vocabulary._FEWEST | vocabulary._FEWEST_OF_TASK.get(task, {})
    words = {
        key: type(WORDS[key])(list(WORDS[key].items() if key in PAIRS else WORDS[key])[:n]) for key, n in fewest.items()
    }
    for sample in babi.simulate(task, 100, 0, babi.Vocabulary(**words)):
        assert sample.answer in babi.answers(task, babi.Vocabulary(**words))
