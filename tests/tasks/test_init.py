import collections
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import lrmt
from lrmt.errors import UsageError
from lrmt.tasks import prose
from lrmt.tasks.registry import MixedTask, build_task
from lrmt.training.collate import collate


@pytest.fixture(autouse=True)
def small_prose(monkeypatch):
    write = prose.write
    monkeypatch.setattr(prose, "write", lambda num_sentences, seed: write(300, seed))


@pytest.mark.parametrize("name", ["passkey", "qa1", "qa3", "qa1,qa2", "passkey, qa3", "niah_single, reasoning"])
def test_tasks_are_built_by_name(tokenizer, name):
    task = build_task(name, tokenizer, segment_length=128)
    assert task.name == name.replace(" ", "")
    batch = collate([task.example(i, 384) for i in range(3)], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (3, 384)
    assert (batch["labels"] != -100).sum(dim=1).max() <= task.max_new_tokens


def test_options_reach_their_tasks(tokenizer, book, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    task = build_task("passkey,qa2", tokenizer, split="test", seed=9, num_digits=7, max_n_facts=8, background_dir=book)
    passkey, qa2 = task.tasks
    assert (passkey.num_digits, qa2.max_n_facts) == (7, 8)
    assert {(t.seed, t.split) for t in (task, passkey, qa2)} == {(9, "test")}
    assert tokenizer.decode(qa2.background.ids[:60]).strip() in book.read_text().replace("\n", " ")


def test_a_mixture_draws_its_tasks_evenly_and_shares_the_background(tokenizer):
    task = build_task("qa1,qa2,passkey", tokenizer)
    assert isinstance(task, MixedTask)
    assert task.tasks[0].background is task.tasks[1].background
    counts = collections.Counter(task.example(i, 300).task for i in range(300))
    assert set(counts) == {"qa1", "qa2", "passkey"}
    assert min(counts.values()) > 70
    assert [task.example(i, 300).task for i in range(20)] == [
        build_task("qa1,qa2,passkey", tokenizer).example(i, 300).task for i in range(20)
    ]


def test_splits_share_no_built_in_prose(tokenizer):
    train, test = (build_task("qa1", tokenizer, split=split) for split in ("train", "test"))

    def sentences(task):
        ids, offsets = task.background.ids.tolist(), task.background.offsets.tolist()
        return {tuple(ids[a:b]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)}

    assert not sentences(train) & sentences(test)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paskey", "--task 'paskey' is unknown; .*; did you mean passkey?"),
        ("qa21", "--task 'qa21' is unknown; known: passkey, qa1..qa20, dataset"),
        ("qa1,data set", "--task 'data set' is unknown.*did you mean dataset?"),
        ("", "--task '' is unknown"),
    ],
)
def test_unknown_names_are_refused(tokenizer, name, message):
    with pytest.raises(UsageError, match=message):
        build_task(name, tokenizer)


def test_unknown_splits_are_refused(tokenizer):
    with pytest.raises(UsageError, match="split must be one of train, validation, test; got 'valid'; did you mean"):
        build_task("passkey", tokenizer, split="valid")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])
def test_shipped_tokenizers_make_exact_examples(name):
    folder = Path(lrmt.__file__).parent / "assets" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not shipped")
    shipped = AutoTokenizer.from_pretrained(folder)
    for task_name in ("passkey", "qa1", "qa2"):
        task = build_task(task_name, shipped, segment_length=128)
        example = task.example(0, 256)
        assert len(example.prompt_ids) + len(example.answer_ids) == 256
        assert shipped.decode(example.prompt_ids).endswith(f" {example.question}")
        assert shipped.decode(example.answer_ids) == f" {example.target}{shipped.eos_token}"
        assert len(example.answer_ids) <= task.max_new_tokens
