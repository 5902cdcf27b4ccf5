import re

import numpy as np
import pytest

from lrmt.errors import UsageError
from lrmt.tasks.passkey import FILLER, WORDINGS
from lrmt.tasks.registry import build_task

LANDMARK = re.compile(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.")


@pytest.mark.parametrize("length", [120, 128, 1000, 100_003])
def test_length_is_exact_and_the_wording_is_whole(tokenizer, length):
    for index in range(5):
        example = build_task("passkey", tokenizer).example(index, length)
        assert len(example.prompt_ids) + len(example.answer_ids) == length
        text = tokenizer.decode(example.prompt_ids)
        (told,) = LANDMARK.findall(text)
        assert told == (example.target, example.target)
        assert text.endswith(" What is the pass key? The pass key is")
        assert tokenizer.decode(example.answer_ids) == f" {example.target}</s>"
        assert 10000 <= int(example.target) <= 99999


def test_all_filler_is_the_landmark_filler(tokenizer):
    task = build_task("passkey", tokenizer, depth=0)
    text = tokenizer.decode(task.example(0, 2000).prompt_ids)
    after_key = text.split("is the pass key.")[1].split(" What is the pass key?")[0]
    assert len(after_key) > 3000
    assert ((" " + " ".join(FILLER)) * 200).startswith(after_key)


@pytest.mark.parametrize(("depth", "share"), [(0, 0.0), (0.5, 0.5), (1, 1.0)])
def test_depth_places_the_key(tokenizer, depth, share):
    task = build_task("passkey", tokenizer, depth=depth)
    ids = task.example(3, 20_000).prompt_ids
    text = tokenizer.decode(ids)
    before, after = text.split(" The pass key is ", 1)
    assert len(before) / len(text) == pytest.approx(share, abs=0.01)


def test_random_depth_covers_the_whole_length(tokenizer):
    task = build_task("passkey", tokenizer)
    texts = [tokenizer.decode(task.example(i, 4000).prompt_ids) for i in range(200)]
    shares = np.array([LANDMARK.search(text).start() / len(text) for text in texts])
    deciles = np.bincount((shares * 10).astype(int), minlength=10)
    assert deciles.min() >= 8
    assert deciles.max() <= 36


def test_examples_depend_on_seed_split_index_and_length_alone(tokenizer):
    def key(seed=0, split="train", index=0, length=300, task=None):
        return (task or build_task("passkey", tokenizer, seed=seed, split=split)).example(index, length).target

    used = build_task("passkey", tokenizer)
    [used.example(i, 300) for i in range(4)]
    assert key(task=used) == key()
    different = [key(), key(seed=1), key(split="validation"), key(split="test"), key(index=1), key(length=301)]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("num_digits", [1, 3, 7])
def test_num_digits(tokenizer, num_digits):
    task = build_task("passkey", tokenizer, num_digits=num_digits)
    examples = [task.example(i, 200) for i in range(20)]
    assert {len(e.target) for e in examples} == {num_digits}
    assert all(len(e.answer_ids) <= task.max_new_tokens for e in examples)


@pytest.mark.parametrize("wording", WORDINGS)
def test_wordings_differ_in_their_first_line(tokenizer, wording):
    example = build_task("passkey", tokenizer, passkey_wording=wording).example(0, 400)
    assert len(example.prompt_ids) + len(example.answer_ids) == 400
    text = tokenizer.decode(example.prompt_ids)
    assert text.startswith(f" {WORDINGS[wording]} ") and text.endswith(" What is the pass key? The pass key is")


def test_the_landmark_wording_is_the_protocol(tokenizer):
    task = build_task("passkey", tokenizer, passkey_wording="landmark", num_digits=2)
    assert task.pieces.tokenizer.decode(task.task_line) == (
        " There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there."
    )
    keys = [int(task.example(index, 400).target) for index in range(400)]
    assert 1 <= min(keys) < 1000 and 49_000 < max(keys) <= 50_000
    deciles = np.bincount(np.array(keys) // 5001, minlength=10)
    assert len(deciles) == 10 and deciles.min() >= 15
    assert all(len(task.example(i, 400).prompt_ids) + len(task.example(i, 400).answer_ids) == 400 for i in range(20))
    plain = build_task("passkey", tokenizer)
    assert tokenizer.decode(plain.task_line) == " Find the pass key in this text."


def test_bad_options_are_refused(tokenizer):
    with pytest.raises(UsageError, match="--passkey_wording must be one of plain, landmark, .*; did you mean longlora"):
        build_task("passkey", tokenizer, passkey_wording="longlara")
    with pytest.raises(UsageError, match="passkey does not fit into 40 tokens; give a length of"):
        build_task("passkey", tokenizer).example(0, 40)
    with pytest.raises(UsageError, match="--num_digits must be"):
        build_task("passkey", tokenizer, num_digits=0)
    with pytest.raises(UsageError, match=r"--depth must lie in \[0, 1\].*got 1.5"):
        build_task("passkey", tokenizer, depth=1.5)
    with pytest.raises(UsageError, match="--segment_length 16 is too short"):
        build_task("passkey", tokenizer, segment_length=16)


def test_early_keys_stand_before_the_last_segment_in_training_only(tokenizer):
    def ends(split, share, segments):
        task = build_task("passkey", tokenizer, split=split, segment_length=96, early_facts_share=share)
        for index in range(40):
            example = task.example(index, segments * 96)
            told = tokenizer.decode(example.prompt_ids).index(f"{example.target} is the pass key.")
            tokens = len(tokenizer.encode(tokenizer.decode(example.prompt_ids)[:told], add_special_tokens=False))
            yield tokens / 96

    assert max(ends("train", 1.0, 3)) < 2 < max(ends("train", 0.0, 3))
    assert max(ends("validation", 1.0, 3)) > 2
    assert sum(at < 2 for at in ends("train", 0.5, 2)) > 0
    assert len(list(ends("train", 1.0, 1))) == 40  # one segment: nowhere else to go
