"""What a perfect reader would have written down: enough to answer, told at the token after which it is known."""

import json
import re
from itertools import pairwise

import pytest

from lrmt.errors import UsageError
from lrmt.tasks import babi, base
from lrmt.tasks.base import encode_plain
from lrmt.tasks.names import BABI
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.registry import build_task

STORIES = {
    "qa1": (
        "Mary moved to the garden. John went to the office. Mary went back to the kitchen.",
        "Daniel nowhere John office Mary kitchen Sandra nowhere",
    ),
    "qa2": (
        "John went to the office. John took the milk there. John moved to the garden. John dropped the milk. Mary got the apple there.",
        "Daniel nowhere John garden Mary nowhere Sandra nowhere apple Mary football nowhere milk garden",
    ),
    "qa3": (
        "John went to the office. John took the milk. John moved to the garden. John went to the hallway. John left the milk there. "
        "John went to the kitchen.",
        "Daniel nowhere John kitchen Mary nowhere Sandra nowhere apple nowhere nowhere nowhere nowhere nowhere "
        "football nowhere nowhere nowhere nowhere nowhere milk nowhere hallway garden office nowhere",
    ),
    "qa4": ("The office is east of the garden. The kitchen is west of the garden.", "office east garden kitchen west garden"),
    "qa5": ("Fred got the milk there. Fred gave the milk to Bill. Bill passed the milk to Jeff.", "Fred milk Bill Bill milk Jeff"),
    "qa9": (
        "Mary is in the office. John is not in the garden. Mary is no longer in the office.",
        "Daniel nowhere John not garden Mary not office Sandra nowhere",
    ),
    "qa10": (
        "Bill is either in the park or the school. Fred went to the cinema.",
        "Bill park or school Fred cinema Julie nowhere Mary nowhere",
    ),
    "qa11": ("Mary went to the office. Then she moved to the garden.", "Daniel nowhere John nowhere Mary garden Sandra nowhere"),
    "qa12": (
        "Mary and John went to the office. John and Sandra moved to the garden.",
        "Daniel nowhere John garden Mary office Sandra garden",
    ),
    "qa13": (
        "Mary and John went to the office. After that they moved to the garden.",
        "Daniel nowhere John garden Mary garden Sandra nowhere",
    ),
    "qa14": (
        "This evening Mary went to the park. Yesterday Mary went to the school. Bill went to the cinema this morning.",
        "Mary school park Bill cinema",
    ),
    "qa15": ("Wolves are afraid of mice. Gertrude is a wolf.", "Wolves fear mice Gertrude wolf"),
    "qa16": ("Lily is a swan. Lily is white. Greg is a swan.", "Lily swan white Greg swan"),
    "qa18": ("The box fits inside the chest. The chest is bigger than the chocolate.", "chest bigger box chest bigger chocolate"),
    "qa20": ("Jason is thirsty. Jason went to the kitchen. Jason got the milk there.", "Jason thirsty kitchen milk Jason"),
}  # fmt: skip


@pytest.mark.parametrize("task", STORIES)
def test_the_state_of_the_world(task):
    story, want = STORIES[task]
    facts = [f"{fact.rstrip('.')}." for fact in story.split(". ")]
    cast, _ = babi.find_cast(task)
    notes = babi.take_notes(facts, task, cast)
    assert len(notes) == len(facts) and notes[-1] == want
    assert babi.take_notes(facts[:1], task, cast) == notes[:1]  # each of what was told so far


@pytest.mark.parametrize("task", BABI)
def test_every_simulated_story_has_notes(task):
    for sample in babi.simulate(task, 30, 1):
        notes = babi.take_notes(sample.facts, task)
        assert len(notes) == len(sample.facts) and (task == "qa5" or all(notes))


def test_those_of_another_vocabulary():
    words = babi.Vocabulary(people={"Ann": "she", "Bob": "he"}, objects=["key"], rooms=["attic", "cellar"])
    cast, rooms = babi.find_cast("qa2", words)
    assert (cast, rooms) == (dict.fromkeys(["Ann", "Bob", "key"], "nowhere"), ["attic", "cellar"])
    stories = babi.simulate("qa2", 30, 1, words)
    for sample in stories:
        assert babi.take_notes(sample.facts, "qa2", cast)[-1].split()[::2] == [*cast]
    assert babi.find_cast("qa2", None, [sample.facts for sample in stories]) == (cast, rooms)  # files name their own
    assert babi.take_notes(["Eve went to the office."], "qa1", dict.fromkeys(["Ann", "Bob"], "nowhere")) == [
        "Ann nowhere Bob nowhere Eve office"
    ]
    official = [sample.facts for sample in babi.simulate("qa2", 30, 1)]
    assert babi.find_cast("qa2", None, official[:1]) == babi.find_cast("qa2")
    assert babi.find_cast("qa2", None, [("Mary flew home.",)]) == ({}, []) == babi.find_cast("qa4")


def test_the_last_gifts_are_kept():
    """And what is kept stays where it is while there is room."""
    names = ["Fred", "Bill", "Jeff", "Mary", "Fred", "Bill", "Jeff"]
    facts = [f"{a} gave the milk to {b}." for a, b in pairwise(names)]
    notes = babi.take_notes(facts, "qa5")
    assert notes[4].startswith(notes[3]) and notes[4].count("milk") == 5
    assert notes[5] == " ".join(f"{a} milk {b}" for a, b in pairwise(names[1:]))


def test_a_thing_of_which_no_room_is_known():
    facts = ["Mary took the milk.", "Mary dropped the milk."]
    assert babi.take_notes(facts, "qa2") == ["milk Mary", "milk nowhere"]
    assert babi.take_notes(facts, "qa3") == [
        f"milk {holder} nowhere nowhere nowhere nowhere" for holder in ("Mary", "nowhere")
    ]


def test_a_sentence_of_another_task():
    with pytest.raises(ValueError, match="not a story of qa1"):
        babi.take_notes(["The office is east of the garden."], "qa1")


@pytest.mark.parametrize(
    ("task", "subject"),
    [("qa1", "Where is {}? "), ("qa2", "Where is the {}? "), ("qa11", "Where is {}? "), ("qa13", "Where is {}? ")],
)
def test_notes_hold_the_answer(task, subject):
    """Whoever has only the notes can answer."""
    before, after = subject.split("{}")
    for sample in babi.simulate(task, 100, 2):
        words = babi.take_notes(sample.facts, task)[-1].split()
        where = dict(zip(words[::2], words[1::2], strict=True))
        found = where[sample.question.removeprefix(before).removesuffix(after)]
        assert where.get(found, found) == sample.answer  # a thing is where its holder is


def test_notes_of_ways_hold_the_answer():
    """But for rooms further back than the last four."""
    right = 0
    for sample in babi.simulate("qa3", 200, 2):
        words = babi.take_notes(sample.facts, "qa3", babi.find_cast("qa3")[0])[-1].split()
        assert len(words) == 26
        thing, room = re.match(r"Where was the (\w+) before the (\w+)", sample.question).groups()
        way = words[words.index(thing) + 2 :][:4]
        right += way[way.index(room) + 1] == sample.answer if room in way[:3] else 0
    assert right >= 190


# ---------------------------------------------------------------------- in texts


@pytest.fixture(scope="module")
def tokenizer(backbones):
    from lrmt.adapters.backbone import load_tokenizer

    return load_tokenizer(str(backbones["llama"]))


@pytest.mark.parametrize("question_position", ["last", "both"])
@pytest.mark.parametrize("task", ["passkey", "qa1", "qa3", "niah_single", "memorize", "detect_memorize", "reasoning"])
def test_each_note_holds_from_the_end_of_what_it_is_of(tokenizer, task, question_position):
    options = {} if task == "passkey" else {"question_position": question_position}
    made = build_task(task, tokenizer, split="train", segment_length=400, **options)
    for index in range(8):
        example = made.example(index, 900)
        assert example.notes and [n.end for n in example.notes] == sorted(n.end for n in example.notes)
        assert example.notes[0] == (0, made.first_note)
        for note in example.notes[1:]:
            read, rest = (
                tokenizer.decode(part) for part in (example.prompt_ids[: note.end], example.prompt_ids[note.end :])
            )
            assert read.rstrip().endswith(".") and (rest == "" or rest[0].isspace())
            last = read.rstrip().rstrip(".").split(". ")[-1].split()[-1]
            if task in ("passkey", "niah_single"):
                assert note.text == example.target and note.text in read
            elif task != "qa3":
                assert last in note.text.split() or last == "there"
    if task in ("memorize", "detect_memorize", "qa1"):
        assert example.target in example.notes[-1].text.split()


def test_a_pass_key_is_whole_on_one_side_of_any_cut(tokenizer):
    """Where a segment ends before its note holds, the next one still says it all; where it ends behind, it has been said."""
    made = build_task("passkey", tokenizer, split="train")
    for index in range(20):
        example = made.example(index, 300)
        (_, note) = example.notes
        read, rest = (
            tokenizer.decode(part) for part in (example.prompt_ids[: note.end], example.prompt_ids[note.end - 1 :])
        )
        assert read.endswith(f"The pass key is {note.text}.") and f" {note.text} is the pass key." in rest
        assert read.count(note.text) == 1


def test_notes_of_a_mixture_begin_alike(tokenizer):
    """A memory cannot know which task a text is of before it tells anything."""
    alone, mixed = (build_task(name, tokenizer, split="train") for name in ("qa2", "qa1,qa2,qa4,passkey"))
    examples = [mixed.example(index, 600) for index in range(40)]
    assert {e.task for e in examples} == {"qa1", "qa2", "qa4", "passkey"}
    assert {e.notes[0] for e in examples} == {(0, alone.first_note)}
    things = [e for e in examples if e.task in ("qa1", "qa2")]
    assert all(e.notes[-1].text.split()[::2] == alone.first_note.split()[::2] for e in things)
    assert all(e.notes[-1].text == e.target for e in examples if e.task == "passkey")


def test_tasks_of_a_mixture_note_a_thing_alike(tokenizer):
    """Those whose stories are told in the same sentences; where a way is asked for, all note it."""
    alone, mixed = build_task("qa3", tokenizer), build_task("qa1,qa2,qa3", tokenizer)
    assert mixed.first_note == alone.first_note and len(mixed.first_note.split()) == 26
    for sample in babi.simulate("qa2", 20, 1):
        assert len({tuple(task.notes(sample)) for task in (alone, *mixed.tasks[1:])}) == 1


def test_tasks_of_a_mixture_agree_on_a_sentence(tokenizer, tmp_path):
    fact = babi.BabiSample(("Mary moved to the garden.",), "Where is Mary? ", "garden", ())
    (tmp_path / "others.yaml").write_text("people: {Ann: she, Bob: he}")
    for words in (None, str(tmp_path / "others.yaml")):
        mixed = build_task("qa1,memorize,detect_memorize,reasoning,passkey", tokenizer, babi_vocabulary=words)
        (note,) = {tuple(task.notes(fact)) for task in mixed.tasks[:3]}
        assert "Mary garden" in note[0] and len(note[0].split()) == (12 if words else 8)
        assert {mixed.example(index, 300).notes[0].text for index in range(20)} == {mixed.first_note}


@pytest.mark.parametrize("test_file", [True, False])
def test_splits_of_files_have_the_cast_of_training(tokenizer, tmp_path, test_file):
    """Whoever is told of in the last of its stories alone; validation and test need not name all."""
    stories = ["1 Ann went to the office.\n2 Where is Ann? \toffice\t1\n"] * 300
    late = "1 Bob moved to the garden.\n2 Where is Bob? \tgarden\t1\n"
    (tmp_path / "qa1_train.txt").write_text("".join([*stories, late]))
    for name in ("valid", *["test"] * test_file):
        (tmp_path / f"qa1_{name}.txt").write_text("".join(stories[:20]))
    made = [build_task("qa1", tokenizer, split=split, babi_dir=tmp_path) for split in ("train", "validation", "test")]
    assert {tuple(task.cast) for task in made} == {("Ann", "Bob")}
    assert len({task.first_note for task in made}) == len({tuple(task.notes(made[2].samples[0])) for task in made}) == 1
    (tmp_path / "qa1_train.txt").unlink()
    assert build_task("qa1", tokenizer, split="test", babi_dir=tmp_path).cast == {"Ann": "nowhere"}


def test_a_word_of_a_cast_is_one_token(tokenizer, tmp_path):
    """The first of a longer one, where that tells words apart."""
    made = build_task("qa1", tokenizer, split="train")
    assert made.first_note == "Daniel now John now Mary now Sandra now"
    for index in range(5):
        for note in made.example(index, 300).notes:
            assert len(made.pieces(note.text)) == 8
    (tmp_path / "alike.yaml").write_text("people: {Zyxab: she, Zyxac: he}")
    made = build_task("qa1", tokenizer, split="train", babi_vocabulary=str(tmp_path / "alike.yaml"))
    assert made.first_note == "Zyxab nowhere Zyxac nowhere"


def test_stories_of_other_grammar_are_noted_verbatim(tokenizer):
    made = build_task("qa1", tokenizer, split="train")
    sample = babi.BabiSample(("Mary flew home.", "John swam."), "Where is Mary? ", "office", ())
    assert made.notes(sample) == ["Mary flew home.", "John swam. Mary flew home."]


# ---------------------------------------------------------------------- rows of the user


def rows_task(tmp_path, tokenizer, *rows, split="train"):
    path = tmp_path / "rows.jsonl"
    base = {
        "input": "The key is under the mat. The mat is red.",
        "question": "Where is the key?",
        "target": "under the mat",
    }
    path.write_text("".join(json.dumps(base | row) + "\n" for row in rows))
    return build_task("dataset", tokenizer, TaskOptions(dataset_name=str(path)), split=split)


def told(task, tokenizer, index=0):
    """What is noted, and after what; nothing is, before any of it."""
    example = task.example(index, 0)
    assert example.notes[:1] in [((0, ""),), ()]
    return [(tokenizer.decode(example.prompt_ids[: note.end]).strip(), note.text) for note in example.notes[1:]]


def test_without_notes_the_target_is_one_from_where_it_is_said(tmp_path, tokenizer):
    assert told(rows_task(tmp_path, tokenizer, {}), tokenizer) == [("The key is under the mat", "under the mat")]
    assert told(rows_task(tmp_path, tokenizer, {"target": "nowhere"}), tokenizer) == []
    assert told(rows_task(tmp_path, tokenizer, {}, split="test"), tokenizer) == []  # nothing is trained on


def test_a_text_is_one_note(tmp_path, tokenizer):
    """From where the input first says it, or else its target."""
    notes = {"notes": "key mat"}
    assert told(rows_task(tmp_path, tokenizer, notes), tokenizer) == [("The key is under the mat", "key mat")]
    assert told(rows_task(tmp_path, tokenizer, {"notes": "The mat"}), tokenizer) == [
        ("The key is under the mat. The mat", "The mat")
    ]


def test_words_are_found_as_words(tmp_path, tokenizer):
    row = {"input": "Nobody knows. There is no key.", "target": "no"}
    assert told(rows_task(tmp_path, tokenizer, row), tokenizer) == [("Nobody knows. There is no", "no")]
    assert told(rows_task(tmp_path, tokenizer, row | {"target": "key \n"}), tokenizer)[0][1] == "key"


def test_a_target_in_text_without_spaces(tmp_path, tokenizer):
    row = {"input": "钥匙在厨房里。", "target": "厨房"}
    assert told(rows_task(tmp_path, tokenizer, row), tokenizer) == [("钥匙在厨房", "厨房")]


def test_an_empty_list_says_that_there_is_nothing_to_note(tmp_path, tokenizer):
    """And not that nothing is said of notes, which null says."""
    nothing, unsaid = ({"notes": notes} for notes in ([], None))
    assert rows_task(tmp_path, tokenizer, nothing).example(0, 0).notes == ((0, ""),)
    assert told(rows_task(tmp_path, tokenizer, unsaid), tokenizer) == [("The key is under the mat", "under the mat")]
    rows_task(tmp_path, tokenizer, *[nothing] * 2)
    mixed = build_task(
        "qa1,dataset", tokenizer, TaskOptions(dataset_name=str(tmp_path / "rows.jsonl")), segment_length=64
    )
    rows = [e for e in (mixed.example(index, 64) for index in range(20)) if e.task == "dataset"]
    assert rows and {e.notes for e in rows} == {((0, mixed.first_note),)}


@pytest.mark.parametrize("fast", [True, False])
def test_notes_hold_from_the_tokens_of_what_they_come_after(tmp_path, tokenizer, monkeypatch, fast):
    """A text is read once more, however many notes it has."""
    sentences = [f"Key {i}\u00a0lies  under the grey mat no. {i}, or café {i}.\n" for i in range(60)]
    notes = [{"after": f"mat no. {i}" if i % 2 else f"café {i}.\n", "notes": str(i)} for i in range(60)]
    task = rows_task(tmp_path, tokenizer, {"input": "  " + "".join(sentences), "notes": notes})
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    found = told(task, tokenizer)
    assert [note for _, note in found] == [str(i) for i in range(60)]
    assert all(text.endswith(note["after"].strip()) for (text, _), note in zip(found, notes, strict=True))
    if fast:
        read = []
        monkeypatch.setattr(base, "encode_plain", lambda t, texts, *a: read.extend(texts) or encode_plain(t, texts, *a))
        assert len(task.example(0, 0).notes) == 61
        assert sum(map(len, read)) < 3 * len("".join(sentences))


def test_a_list_says_where_each_note_begins(tmp_path, tokenizer):
    notes = [{"after": "mat", "notes": "mat"}, {"after": "mat is red", "notes": "red mat"}]
    want = [("The key is under the mat", "mat"), ("The key is under the mat. The mat is red", "red mat")]
    assert told(rows_task(tmp_path, tokenizer, {"notes": notes}), tokenizer) == want
    assert (
        told(rows_task(tmp_path, tokenizer, {"notes": json.dumps(notes)}), tokenizer) == want
    )  # as flat files have it


def test_a_text_in_brackets_is_a_text(tmp_path, tokenizer):
    row = {"input": "The code is [48213]. Keep it.", "target": "48213", "notes": "[48213]"}
    assert told(rows_task(tmp_path, tokenizer, row), tokenizer) == [("The code is [48213]", "[48213]")]


def test_a_note_comes_after_words_not_their_beginnings(tmp_path, tokenizer):
    row = {
        "input": "Anna is in the hall. Ann is in the kitchen.",
        "target": "kitchen",
        "notes": [{"after": "Ann", "notes": "kitchen"}],
    }
    assert told(rows_task(tmp_path, tokenizer, row), tokenizer) == [("Anna is in the hall. Ann", "kitchen")]


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ("", "row 1 has no text in 'notes'|row 1, notes: has no text"),
        (7, "row 1: `notes` must be a text or a list of .after, notes.; got '7'"),
        (["mat"], "row 1: `notes` must be a text or a list"),
        ([{"after": "mat"}], "row 1: `notes` must be a text or a list"),
        ([{"after": "the lake", "notes": "x"}], "row 1: the input does not say 'the lake'"),
        ([{"after": "red", "notes": "x"}, {"after": "key", "notes": "y"}], "row 1: the input does not say 'key'.*in this order"),
        ([{"after": "mat", "notes": " "}], "row 1, notes: has no text in 'notes'"),
        ([{"after": "mat", "notes": 5}], "row 1, notes: has no text in 'notes'"),
        ("elsewhere", "row 1: the input says neither its `notes`, 'elsewhere', nor its target"),
    ],
)  # fmt: skip
def test_notes_that_cannot_be_read(tmp_path, tokenizer, notes, expected):
    """Which does not matter to whoever scores none."""
    row = {"notes": notes} | ({"target": "nowhere"} if notes == "elsewhere" else {})
    task = rows_task(tmp_path, tokenizer, row)
    with pytest.raises(UsageError, match=expected):
        raise task.wrong_notes
    task.example(0, 0)
