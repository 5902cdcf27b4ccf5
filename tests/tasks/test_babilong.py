import re
import time

import numpy as np
import pytest
from scipy.stats import chisquare

from lrmt.errors import UsageError
from lrmt.tasks import babi
from lrmt.tasks.background import Background, ProceduralProse
from lrmt.tasks.registry import build_task

FACT = re.compile(rf"(?:{'|'.join(babi.PEOPLE)}) (?:{'|'.join(babi.GO + babi.GET + babi.DROP)}) the \w+(?: there)?\.")


@pytest.fixture(scope="module")
def prose(tokenizer):
    return ProceduralProse(tokenizer, num_sentences=1000)


@pytest.fixture
def babi_dir(tmp_path):
    """Ten numbered samples of qa1: sample i has i + 1 facts."""
    folder = tmp_path / "babi"
    folder.mkdir()
    for split in ("train", "valid"):
        stories = []
        for i in range(10):
            stories += [f"{j + 1} John went to the {babi.ROOMS[(i + j) % 6]}." for j in range(i + 1)]
            stories.append(f"{i + 2} Where is John? \t{babi.ROOMS[2 * i % 6]}\t{i + 1}")
        (folder / f"qa1_{split}.txt").write_text("\n".join(stories) + "\n")
    return folder


def decode(tokenizer, example):
    return tokenizer.decode(example.prompt_ids)


def total(example):
    return len(example.prompt_ids) + len(example.answer_ids)


@pytest.mark.parametrize("name", babi.SIMULATED)
def test_every_task_is_simulated_without_files(tokenizer, prose, name):
    task = build_task(name, tokenizer, background=prose)
    for index in range(5):
        example, sample = task.example(index, 1500), task.draw(index, 1500, whole=True)
        assert total(example) == 1500
        assert (example.question, example.target) == (sample.question.strip(), sample.answer)
        assert len(example.answer_ids) <= task.max_new_tokens
        assert re.search(".*".join(map(re.escape, sample.facts)), decode(tokenizer, example))


@pytest.mark.parametrize("name", ["qa1", "qa2", "qa3"])
@pytest.mark.parametrize("position", ["last", "first", "both"])
def test_length_is_exact_and_the_facts_answer_the_question(tokenizer, prose, name, position):
    task = build_task(name, tokenizer, background=prose, question_position=position)
    for index in range(30):
        length = (256, 384, 1000)[index % 3]
        example = task.example(index, length)
        assert total(example) == length
        text, question = decode(tokenizer, example), example.question
        assert babi.solve(FACT.findall(text), question, name)[0] == example.target
        assert tokenizer.decode(example.answer_ids) == f" {example.target}</s>"
        assert len(example.answer_ids) <= task.max_new_tokens
        assert text.endswith(f" {question}") == (position != "first")
        assert text.startswith(f" {question}") == (position != "last")
        assert text.count(question) == (2 if position == "both" else 1)


def test_facts_fill_the_length_when_there_is_no_room_for_background(tokenizer, prose, babi_dir):
    task = build_task("qa1", tokenizer, background=prose, split="test", babi_dir=babi_dir)
    bare = task.example(4, 0)
    assert decode(tokenizer, bare) == " " + " ".join([*task.samples[4].facts, "Where is John?"])
    assert total(bare) == task.num_tokens[4]
    exact = task.example(4, total(bare))
    assert np.array_equal(exact.prompt_ids, bare.prompt_ids)


def test_test_keeps_file_order_and_leaves_out_what_does_not_fit(tokenizer, prose, babi_dir):
    task = build_task("qa1", tokenizer, background=prose, split="test", babi_dir=babi_dir)

    def facts(index, length):
        return len(FACT.findall(decode(tokenizer, task.example(index, length))))

    assert [facts(i, 600) for i in range(11)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1]
    short = int(task.num_tokens[5])
    assert [facts(i, short) for i in range(7)] == [1, 2, 3, 4, 5, 6, 1]
    assert (task.num_examples(600), task.num_examples(short), task.num_examples(0)) == (10, 6, 10)
    with pytest.raises(
        UsageError, match=rf"no sample of qa1 fits into 8 tokens; the shortest takes {task.num_tokens[0]}"
    ):
        task.example(0, 8)


def test_an_epoch_of_training_meets_every_sample_once(tokenizer, prose, babi_dir):
    task = build_task("qa1", tokenizer, background=prose, babi_dir=babi_dir)
    epochs = [[len(FACT.findall(decode(tokenizer, task.example(9 * e + i, 400)))) for i in range(9)] for e in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 10))] * 2
    assert epochs[0] != epochs[1]


def test_what_selects_a_model_is_never_what_is_reported(tokenizer, prose, babi_dir):
    def facts(split):
        task = build_task("qa1", tokenizer, background=prose, split=split, babi_dir=babi_dir)
        return [len(task.samples[i].facts) for i in range(len(task.samples))], task.samples

    # without a test file: valid is test, and the last tenth of train is validation
    assert facts("train")[0] == list(range(1, 10)) and facts("validation")[0] == [10]
    valid = facts("test")[1]
    # with one: each file is what its name says
    (babi_dir / "qa1_test.txt").write_text((babi_dir / "qa1_train.txt").read_text())
    assert facts("train")[0] == list(range(1, 11)) == facts("test")[0]
    assert facts("validation")[1] == valid


def test_max_n_facts_leaves_out_long_samples(tokenizer, prose, babi_dir):
    stored = build_task("qa1", tokenizer, background=prose, split="test", babi_dir=babi_dir, max_n_facts=3)
    assert stored.num_examples(600) == 3
    simulated = build_task("qa2", tokenizer, background=prose, max_n_facts=6)
    counts = [len(FACT.findall(decode(tokenizer, simulated.example(i, 300)))) for i in range(40)]
    assert max(counts) == 6
    with pytest.raises(UsageError, match="no sample of qa1 has 1 facts or fewer"):
        (babi_dir / "qa1_test.txt").write_text(
            "1 John got up.\n2 John went to the office.\n3 Where is John?\toffice\t2"
        )
        build_task("qa1", tokenizer, background=prose, split="test", babi_dir=babi_dir, max_n_facts=1)
    with pytest.raises(UsageError, match="no story of qa3 fits into 200 tokens with --max_n_facts 3"):
        build_task("qa3", tokenizer, background=prose, max_n_facts=3).example(0, 200)


@pytest.mark.parametrize("stored", [False, True])
def test_examples_depend_on_seed_split_index_and_length_alone(tokenizer, prose, babi_dir, stored):
    folder = babi_dir if stored else None

    def build(seed=0, split="train"):
        return build_task("qa1", tokenizer, background=prose, seed=seed, split=split, babi_dir=folder)

    used = build()
    forward = [used.example(i, 500).prompt_ids.tolist() for i in range(6)]
    backward = [used.example(i, 500).prompt_ids.tolist() for i in reversed(range(6))]
    assert forward == backward[::-1] == [build().example(i, 500).prompt_ids.tolist() for i in range(6)]
    others = [
        build(seed=1).example(0, 500),
        build(split="validation").example(0, 500),
        build(split="test").example(0, 500),
    ]
    texts = {tuple(forward[0]), *(tuple(e.prompt_ids.tolist()) for e in others)}
    assert len(texts) == 4
    assert len(set(map(tuple, forward))) == 6


def test_simulated_stories_differ_between_splits_and_stop_at_any_of_their_questions(tokenizer, prose):
    tasks = [build_task("qa1", tokenizer, background=prose, split=split) for split in ("train", "validation", "test")]
    stories = [{decode(tokenizer, task.example(i, 0)) for i in range(500)} for task in tasks]
    assert len(stories[0] & stories[1]) < 25 and len(stories[1] & stories[2]) < 25  # short ones recur by chance
    counts = np.bincount([len(FACT.findall(decode(tokenizer, tasks[0].example(i, 0)))) for i in range(1000)])
    assert np.flatnonzero(counts).tolist() == [2, 4, 6, 8, 10]
    assert chisquare(counts[2::2]).pvalue > 1e-3


def test_facts_go_to_uniform_gaps_in_order(tokenizer, prose):
    """Gaps drawn with replacement: each fact's gap uniform over n + 1, and several facts may share one."""
    task = build_task("qa1", tokenizer, background=prose)
    offsets = np.arange(6)  # five sentences of one token
    rng = np.random.default_rng(0)
    counts, shared = np.zeros(6, dtype=int), 0
    for _ in range(3000):
        gaps = task._draw_gaps(rng, offsets, 2, (0.0, 1.0))
        assert gaps[0] <= gaps[1]
        counts += np.bincount(gaps, minlength=6)
        shared += gaps[0] == gaps[1]
    assert chisquare(counts).pvalue > 1e-3
    assert shared / 3000 == pytest.approx(1 / 6, abs=0.03)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.5, 0.5), (0.9, 1.0), (0.25, 0.75)])
def test_span_restricts_the_facts_by_token_offset(tokenizer, prose, start, end):
    task = build_task("qa1", tokenizer, background=prose, task_start_pct=start, task_end_pct=end)
    slack = 0.02  # one sentence, and the facts themselves
    for index in range(20):
        text = decode(tokenizer, task.example(index, 8000))
        found = [m.start() / len(text) for m in FACT.finditer(text)]
        assert start - slack <= min(found) and max(found) <= end + slack


def test_a_segment_must_hold_question_and_answer(tokenizer, prose):
    build_task("qa1", tokenizer, background=prose, segment_length=16)
    with pytest.raises(UsageError, match="--segment_length 4 is too short: question and answer of qa1"):
        build_task("qa1", tokenizer, background=prose, segment_length=4)


def test_bad_options_are_refused(tokenizer, prose, tmp_path, babi_dir):
    for options, message in (
        ({"question_position": "middle"}, "--question_position must be one of last, first, both; got 'middle'"),
        ({"task_start_pct": 0.7, "task_end_pct": 0.2}, "0 <= start <= end <= 1; got 0.7 and 0.2"),
        ({"max_n_facts": 0}, "--max_n_facts must be 1 or more"),
        ({"babi_dir": tmp_path / "none"}, "--babi_dir .*none is not a folder"),
        ({"babi_dir": tmp_path}, "has no qa1_train.txt; it holds: babi"),
    ):
        with pytest.raises(UsageError, match=message):
            build_task("qa1", tokenizer, background=prose, **options)


def test_a_folder_that_is_none_is_refused_whatever_reads_it(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="--babi_dir .*none is not a folder; give the one"):
        build_task("passkey", tokenizer, babi_dir=tmp_path / "none")
    build_task("passkey", tokenizer, babi_dir=tmp_path)  # it may be of other tasks


def test_the_test_split_prefers_a_test_file_and_knows_the_archives_names(tokenizer, prose, babi_dir):
    def first(split):
        return build_task("qa1", tokenizer, background=prose, split=split, babi_dir=babi_dir).example(0, 0).target

    assert (first("validation"), first("test")) == ("bathroom", "bathroom")
    for name, room in (("qa1_single-supporting-fact_test.txt", "garden"), ("qa10_test.txt", "office")):
        (babi_dir / name).write_text(f"1 John went to the {room}.\n2 Where is John?\t{room}\t1\n")
    assert (first("validation"), first("test")) == ("bathroom", "garden")


def test_examples_are_cheap(tokenizer, prose):
    def best_of(repeats, task, length):
        times = []
        for index in range(repeats):
            begin = time.perf_counter()
            task.example(index, length)
            times.append(time.perf_counter() - begin)
        return min(times)

    task = build_task("qa1", tokenizer, background=prose)
    assert best_of(50, task, 8 * 128) < 1e-3
    assert best_of(3, task, 1_000_000) < 0.2


@pytest.mark.realdata
def test_official_files_over_real_books(tokenizer, data_dir, tmp_path):
    book = Background(data_dir / "books" / "moby_dick.txt", tokenizer, tmp_path)
    for name in (f"qa{n}" for n in range(1, 21)):
        task = build_task(
            name, tokenizer, background=book, split="test", babi_dir=data_dir / "babi", segment_length=128
        )
        assert task.num_examples(0) == len(babi.read(data_dir / "babi" / f"{name}_valid.txt"))
        example = task.example(7, 1024)
        assert total(example) == 1024
        text, place = decode(tokenizer, example), 0
        fits = [s for s, n in zip(task.samples, task.num_tokens, strict=True) if n <= 1024]
        for fact in fits[7].facts:  # in order, each after the one before
            place = text.index(fact, place) + len(fact)
        assert text.endswith(f" {fits[7].question.strip()}")
        assert example.target == fits[7].answer


@pytest.mark.parametrize("position", ["last", "both"])
def test_early_facts_stand_before_the_last_segment(tokenizer, prose, position):
    def last_fact(share):
        task = build_task(
            "qa1", tokenizer, background=prose, segment_length=128, early_facts_share=share, question_position=position
        )
        for index in range(40):
            text = decode(tokenizer, task.example(index, 384))
            end = [match.end() for match in FACT.finditer(text)][-1]
            yield len(tokenizer.encode(text[:end], add_special_tokens=False))

    assert max(last_fact(1.0)) <= 256 < max(last_fact(0.0))


def test_other_words(tokenizer, tmp_path):
    (tmp_path / "words.yaml").write_text("{people: {Ann: she, Bob: he}, rooms: [attic, cellar, pantry]}")
    task = build_task("qa1", tokenizer, babi_vocabulary=tmp_path / "words.yaml")
    examples = [task.example(index, 120) for index in range(40)]
    assert {example.target for example in examples} == {"attic", "cellar", "pantry"}
    assert {example.question for example in examples} == {"Where is Ann?", "Where is Bob?"}
    (tmp_path / "qa1_train.txt").write_text("1 Mary went to the office.\n2 Where is Mary? \toffice\t1\n" * 20)
    with pytest.raises(UsageError, match="--babi_vocabulary .* --babi_dir"):
        build_task("qa1", tokenizer, babi_vocabulary=tmp_path / "words.yaml", babi_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "answer", "known"),
    [
        ("qa1", "kitchen,office", False),
        ("qa6", "yes,no", False),
        ("qa14", "park,office", False),
        ("qa19", "n,e", True),
        ("qa19", "n,e,s,w", False),
        ("qa8", "apple,milk", True),
        ("qa8", "apple,pear", False),
        ("qa8", "Nothing", True),
    ],
)
def test_lists_are_answers_of_qa8_alone(tokenizer, prose, tmp_path, name, answer, known):
    (tmp_path / f"{name}_test.txt").write_text(f"1 John went away.\n2 What is it?\t{answer}\t1\n")
    if known:
        assert build_task(name, tokenizer, background=prose, split="test", babi_dir=tmp_path).num_examples(0) == 1
        return
    with pytest.raises(UsageError, match=f"{name}_test.txt answers .* '{answer}', which is no label of {name}"):
        build_task(name, tokenizer, background=prose, split="test", babi_dir=tmp_path)
