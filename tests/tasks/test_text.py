import json

import numpy as np
import pytest
import torch

from lrmt.arguments import TaskArguments
from lrmt.errors import UsageError
from lrmt.tasks import prose
from lrmt.tasks import text as module
from lrmt.tasks.registry import build_task
from lrmt.training.collate import collate


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def window(example):
    return np.concatenate([example.prompt_ids, example.answer_ids])


def places(tokens, window):
    """Where `window` occurs in `tokens`."""
    return [i for i in range(len(tokens) - len(window) + 1) if np.array_equal(tokens[i : i + len(window)], window)]


def test_a_window_has_exactly_its_length_and_all_but_its_first_token_is_scored(tokenizer, book):
    task = build_task("text", tokenizer, text_path=book, split="test")
    for length in (2, 17, 400, len(task.tokens)):
        example = task.example(3, length)
        assert (len(example.prompt_ids), len(example.answer_ids)) == (1, length - 1)
        assert len(places(task.tokens, window(example))) >= 1
        assert (example.question, example.target, example.task) == ("", "", "text")
    batch = collate([task.example(i, 64) for i in range(3)], pad_token_id=0)
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (3, 64)
    assert bool((batch["labels"][:, 0] == -100).all())
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


def test_a_window_is_a_function_of_seed_split_index_and_length(tokenizer, book):
    def windows(seed=0, split="train"):
        task = build_task("text", tokenizer, text_path=book, seed=seed, split=split)
        return [tuple(window(task.example(i, 50))) for i in range(8)]

    assert windows() == windows()
    assert len(set(windows())) == 8
    assert not set(windows()) & set(windows(seed=1))
    assert tuple(window(build_task("text", tokenizer, text_path=book).example(0, 51))[:50]) != windows()[0]
    task = build_task("text", tokenizer, text_path=book)
    assert [tuple(window(task.example(i, 50))) for i in reversed(range(8))] == windows()[::-1]  # no state


def test_every_place_can_be_drawn(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text(" ".join(f"{n}" for n in range(10)))
    task = build_task("text", tokenizer, text_path=tmp_path / "short.txt", split="test")
    length = len(task.tokens) - 2
    drawn = {tuple(window(task.example(i, length))) for i in range(60)}
    assert drawn == {tuple(task.tokens[i : i + length]) for i in range(3)}


def test_the_last_tenth_of_the_tokens_is_held_out_of_training(tokenizer, book):
    train, validation, test = (
        build_task("text", tokenizer, text_path=book, split=s).tokens for s in ("train", "validation", "test")
    )
    assert len(validation) == len(test) // 10
    assert np.array_equal(np.concatenate([train, validation]), test)
    assert test.tolist() == ids(tokenizer, book.read_text().strip())
    assert test.dtype == np.int32


def test_documents_are_parted_by_eos(tokenizer, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("The first.\n")
    (tmp_path / "b" / "empty.txt").write_text(" \n")
    licence = "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nThe second.\nEnd of Project Gutenberg's X\nlicence"
    (tmp_path / "b" / "second.txt").write_text(licence)
    texts = ["The first.", "The second.", "A third\u2028line."]
    eos = tokenizer.eos_token_id
    expected = [*ids(tokenizer, texts[0]), eos, *ids(tokenizer, texts[1])]
    assert build_task("text", tokenizer, text_path=tmp_path, split="test").tokens.tolist() == expected
    rows = "".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n\n" for text in (*texts, ""))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    expected += [eos, *ids(tokenizer, texts[2])]
    assert build_task("text", tokenizer, text_path=tmp_path / "rows.jsonl", split="test").tokens.tolist() == expected


def test_more_documents_than_are_tokenised_at_once(tokenizer, tmp_path):
    texts = prose.write(2 * module._BATCH + 3, 0)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = build_task("text", tokenizer, text_path=tmp_path / "rows.jsonl", split="test").tokens
    assert tokenizer.decode(tokens).split(tokenizer.eos_token) == texts


def test_a_text_is_tokenised_once_for_all_splits_and_anew_when_it_changes(
    tokenizer, other_tokenizer, tmp_path, monkeypatch
):
    path, calls, tokenise = tmp_path / "text.txt", [], module._tokenise
    monkeypatch.setattr(module, "_tokenise", lambda *given: calls.append(given) or tokenise(*given))
    path.write_text("One two three. " * 20)
    for split in ("train", "validation", "test"):
        build_task("text", tokenizer, text_path=path, split=split)
    assert len(calls) == 1
    first = build_task("text", tokenizer, text_path=path, split="test").tokens
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    path.write_text("Four five six. " * 30)
    assert tokenizer.decode(build_task("text", tokenizer, text_path=path, split="test").tokens).startswith("Four")
    assert other_tokenizer.decode(build_task("text", other_tokenizer, text_path=path, split="test").tokens).startswith(
        "Four"
    )


def test_a_hub_data_set_is_streamed_until_there_is_enough(tokenizer, monkeypatch):
    asked, read = [], []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "org/gone":
            raise FileNotFoundError("no such\ndataset")

        def rows():
            for n in range(10**6):
                read.append(n)
                yield {"text": f"Row {n} of very many."} if name != "org/other" else {"body": ""}
                if name == "org/broken":
                    raise ConnectionError("gone\naway")

        return rows()

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(module, "MAX_HUB_TOKENS", 1500)
    tokens = build_task(
        "text", tokenizer, text_path="org/books", split="test", dataset_config="en", dataset_split="all"
    ).tokens
    assert len(tokens) == 1500 and len(read) < 1000
    assert tokenizer.decode(tokens).startswith(f"Row 0 of very many.{tokenizer.eos_token}Row 1 of")
    build_task("text", tokenizer, text_path="org/books")
    assert asked == [("org/books", "en", "all", True), ("org/books", None, "train", True)]
    for name, message in (
        ("org/gone", "cannot load --text_path org/gone of split train: no such dataset"),
        ("org/broken", "cannot load --text_path org/broken of split train: gone away"),
        ("org/other", "--text_path org/other of split train row 1 has no column 'text'; found: body"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            build_task("text", tokenizer, text_path=name)
        assert "\n" not in str(caught.value)


def test_bad_texts_are_refused_in_one_line(tokenizer, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "table.csv").write_text("a,b\n")
    for name, text in (
        ("empty.txt", " \n"),
        ("column.jsonl", '{"text": "a"}\n{"txt": "b"}\n'),
        ("number.jsonl", '{"text": 7}\n'),
        ("cut.jsonl", '{"text": "a"}\n{"text": '),
        ("list.jsonl", "[1]\n"),
    ):
        (tmp_path / name).write_text(text)
    for name, message in (
        ("gone.txt", "--text_path .*gone.txt does not exist; .* holds: column.jsonl, cut.jsonl, empty.txt"),
        ("none", "--text_path .*none has no .txt file; it holds: table.csv"),
        ("none/table.csv", "--text_path .*table.csv is neither .txt nor .jsonl"),
        ("empty.txt", "--text_path .*empty.txt holds no text"),
        ("column.jsonl", "--text_path .*column.jsonl row 2 has no column 'text'; found: txt"),
        ("number.jsonl", r"--text_path .*number.jsonl row 1 has no text in 'text' \(got 7\)"),
        ("cut.jsonl", "cut.jsonl:2 is not JSON"),
        ("list.jsonl", "list.jsonl:1 is no JSON object; give {text}"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            build_task("text", tokenizer, text_path=tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="needs --text_path"):
        build_task("text", tokenizer)


def test_a_text_shorter_than_a_window_is_refused(tokenizer, book):
    task = build_task("text", tokenizer, text_path=book, split="validation")
    there = len(task.tokens)
    task.example(0, there)
    with pytest.raises(UsageError, match=f"{there} tokens for split validation, fewer than one text of {there + 1}"):
        task.example(0, there + 1)


def test_a_path_is_its_own_task():
    assert TaskArguments(text_path="books").task == "text"
    assert TaskArguments(text_path="books", task="qa1,text").task == "qa1,text"
    assert TaskArguments(dataset_name="rows.jsonl").task == "dataset"
    for task in ("text", "qa1,text"):
        with pytest.raises(UsageError, match=f"`--task {task}` needs `--text_path`"):
            TaskArguments(task=task)
    with pytest.raises(UsageError, match="`--text_path` and `--dataset_name`"):
        TaskArguments(text_path="books", dataset_name="rows.jsonl")


def test_training_on_text(train_small, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(prose.write(300, 7)))
    flags = ["--text_path", path, "--stage_max_steps", "1", "--segment_length", "32", "--curriculum_stages", "1", "2"]
    trainer = train_small(*flags)
    assert trainer.train_task.name == trainer.eval_task.name == "text"
    assert trainer.state.log_history[0]["loss"] > 0
    assert trainer.identity["text_path"] == "book.txt"
    output_dir = tmp_path / "run"
    # the last stage's texts are longer than the tenth that is held out
    with pytest.raises(UsageError, match="tokens for split validation, fewer than one text of 3200"):
        train_small(*flags[:-2], "1", "100", "--output_dir", output_dir)
    assert not output_dir.exists()


def test_what_spells_a_special_token_is_text(shipped, tmp_path):
    """Or a book about markup would end, and be padded, in its middle."""
    text = "One writes <s>old</s> and <pad> in it."
    (tmp_path / "markup.txt").write_text(text)
    tokens = build_task("text", shipped, text_path=tmp_path / "markup.txt", split="test").tokens
    assert not set(shipped.all_special_ids) & set(tokens.tolist())
    assert shipped.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Bücher aus Łódź".encode("iso8859-2"), r"book.txt is not UTF-8 text \(byte 1\); .*iconv"),
        ("他走进了厨房。".encode("gbk"), r"book.txt is not UTF-8 text \(byte 0\); .*iconv"),
        ("Call me Nora.".encode("utf-16"), r"book.txt is not UTF-8 text \(byte 0\), but UTF-16"),
        ("Call me Nora.".encode("utf-16-be"), r"book.txt is not UTF-8 text \(byte 0\), but UTF-16"),
    ],
)
def test_books_in_another_encoding_are_refused(tokenizer, tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(UsageError, match=f"--text_path .*{message}"):
        build_task("text", tokenizer, text_path=tmp_path, split="test")
    with pytest.raises(UsageError, match=f"--background_dir .*{message}"):
        build_task("qa1", tokenizer, background_dir=tmp_path)


@pytest.mark.parametrize("option", ["text_path", "background_dir"])
def test_half_a_character_of_a_document_is_refused_by_its_line(tokenizer, tmp_path, option):
    rows = ['{"text": "The mill stood idle."}', "", '{"text": "The mill \\ud83d stood idle."}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=rf"--{option} .*rows.jsonl row 3, 'text', has half a character, '\\ud83d'"):
        build_task("text" if option == "text_path" else "qa1", tokenizer, **{option: tmp_path / "rows.jsonl"})
