import numpy as np
import pytest

from lrmt.errors import UsageError
from lrmt.tasks import babi, background, prose
from lrmt.tasks.background import Background, ProceduralProse, split_sentences, strip_gutenberg
from lrmt.tasks.base import Pieces


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It rained. The roof leaked! Who knew? Nobody.", ["It rained.", "The roof leaked!", "Who knew?", "Nobody."]),
        ("Mr. Hill met Dr. J. R. Stone. They spoke.", ["Mr. Hill met Dr. J. R. Stone.", "They spoke."]),
        ("“Go home.” He went. 'Why?' 4 men asked.", ["“Go home.”", "He went.", "'Why?'", "4 men asked."]),
        ("It cost 3.50 in all, i.e. much. e.g. this stays", ["It cost 3.50 in all, i.e. much. e.g. this stays"]),
        ("He said no. She left.", ["He said no.", "She left."]),
        ("A title\n\nA line that\nis broken.  Next one", ["A title", "A line that is broken.", "Next one"]),
        ("Wait... what is it? Well... No.", ["Wait... what is it?", "Well...", "No."]),
        ("first\r\n\r\nsecond", ["first", "second"]),
        ("  \n\n ", []),
    ],
)
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_strip_gutenberg_keeps_what_lies_between_the_marks():
    body = "\nThe book itself.\n"
    start, end = "*** START OF THIS PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
    assert strip_gutenberg(f"licence\n{start}{body}{end}\nlicence") == body
    assert strip_gutenberg(f"{start}{body}End of Project Gutenberg's X\n\n{end}") == body
    assert strip_gutenberg(body) == body


def test_take_is_exact_and_consecutive(tokenizer, book, tmp_path):
    pool = Background(book, tokenizer, tmp_path / "cache")
    sentences = [" " + s for s in book.read_text().splitlines() if len(Pieces(tokenizer)(s)) >= 10]
    for num_tokens in (1, 9, 500, 3000):
        taken = pool.take(np.random.default_rng(num_tokens), num_tokens)
        assert sum(map(len, taken)) == num_tokens
        texts = [tokenizer.decode(ids) for ids in taken]
        start = next(i for i, s in enumerate(sentences) if s.startswith(texts[0]))
        told = [sentences[(start + i) % len(sentences)] for i in range(len(texts))]
        assert texts[:-1] == told[:-1]
        assert told[-1].startswith(texts[-1].rstrip("\ufffd"))
    assert pool.take(np.random.default_rng(0), 0) == []


def test_take_wraps_around_the_last_book(tokenizer, tmp_path):
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (tmp_path / name).write_text("\n".join(prose.write(20, seed)))
    pool = Background(tmp_path, tokenizer, tmp_path / "cache")
    total = len(pool.ids)
    taken = np.concatenate(pool.take(np.random.default_rng(3), 3 * total + 17))
    assert len(taken) == 3 * total + 17
    assert np.array_equal(taken[:total], taken[total : 2 * total])
    assert sorted(taken[:total]) == sorted(pool.ids)


def test_every_book_is_as_likely_whatever_its_size(tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(prose.write(500, 1)))
    (tmp_path / "short.txt").write_text("\n".join(prose.write(20, 2)))
    pool = Background(tmp_path, tokenizer, tmp_path / "cache")
    (_, border), _ = pool.books
    rng = np.random.default_rng(0)
    starts = [pool.take(rng, 1)[0].__array_interface__["data"][0] for _ in range(400)]
    in_short = sum(start >= pool.ids[pool.offsets[border] :].__array_interface__["data"][0] for start in starts)
    assert 160 <= in_short <= 240


def test_short_sentences_are_dropped(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text(
        "Yes. No.\n\n" + "The solemn librarian wandered slowly past the old orchard wall."
    )
    pool = Background(tmp_path / "book.txt", tokenizer, tmp_path / "cache")
    assert len(pool.offsets) == 2
    assert tokenizer.decode(pool.ids) == " The solemn librarian wandered slowly past the old orchard wall."


def test_cache_is_used_again_and_only_for_the_same_texts_and_tokenizer(
    tokenizer, other_tokenizer, book, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    first = Background(book, tokenizer, cache)
    calls = []
    tokenise = background._tokenise
    monkeypatch.setattr(background, "_tokenise", lambda *given: calls.append(given) or tokenise(*given))

    again = Background(book, tokenizer, cache)
    assert not calls
    assert np.array_equal(again.ids, first.ids) and np.array_equal(again.offsets, first.offsets)
    assert again.books == first.books

    other = Background(book, other_tokenizer, cache)
    assert len(calls) == 1
    assert other_tokenizer.decode(other.ids[: other.offsets[1]]) == tokenizer.decode(first.ids[: first.offsets[1]])

    book.write_text(book.read_text() + "\nThe grave surveyor patiently counted every rusty lantern.")
    assert len(Background(book, tokenizer, cache).offsets) == len(first.offsets) + 1
    assert len(calls) == 2
    assert len(list(cache.iterdir())) == 3  # and no temporary file


def test_a_damaged_cache_is_made_again(tokenizer, book, tmp_path):
    first = Background(book, tokenizer, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:200])
    assert np.array_equal(Background(book, tokenizer, tmp_path / "cache").ids, first.ids)
    with np.load(stored) as whole:
        assert np.array_equal(whole["ids"], first.ids)


def test_a_cache_folder_that_cannot_be_written_only_warns(tokenizer, book, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="background not cached"):
        pool = Background(book, tokenizer, tmp_path / "file" / "cache")
    assert len(pool.ids)


def test_missing_or_empty_sources_are_refused(tokenizer, tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match=r"has no .txt file; it holds: notes.md"):
        Background(tmp_path, tokenizer)
    with pytest.raises(UsageError, match=r"does not exist; .* holds: notes.md"):
        Background(tmp_path / "book.txt", tokenizer)
    (tmp_path / "book.txt").write_text("Too short.")
    with pytest.raises(UsageError, match="no sentence of 10 tokens or more"):
        Background(tmp_path / "book.txt", tokenizer, tmp_path / "cache")


def test_prose_is_varied_seeded_and_answers_no_question(tokenizer):
    sentences = prose.write(4000, 1)
    assert sentences == prose.write(4000, 1)
    assert not set(sentences[:1000]) & set(prose.write(1000, 2))
    assert len(set(sentences)) > 0.97 * len(sentences)
    words = set(" ".join(sentences).replace(".", " ").split())
    assert len({w.lower() for w in words}) > 400
    assert not words & {*babi.PEOPLE, "Bill", "Fred", "Jeff", "Julie"}
    assert not any(char.isdigit() or char in "<>_" for s in sentences for char in s)
    one, two = (ProceduralProse(tokenizer, seed=s, num_sentences=200) for s in (0, 1))
    assert not np.array_equal(one.ids[:50], two.ids[:50])
    assert sum(map(len, one.take(np.random.default_rng(0), 700))) == 700


@pytest.mark.realdata
def test_real_books_make_plausible_sentences(tokenizer, data_dir):
    text = strip_gutenberg((data_dir / "books" / "moby_dick.txt").read_text(encoding="utf-8-sig"))
    sentences = split_sentences(text)
    assert "Project Gutenberg" not in sentences[0] + sentences[-1]
    assert not any("EBOOK" in s or "Gutenberg-tm" in s for s in sentences)
    assert any(s.startswith("Call me Ishmael.") for s in sentences)
    assert 9000 < len(sentences) < 13000
    assert np.mean([s[-1] in ".!?”’\"')" for s in sentences]) > 0.8
    assert not any(s.endswith((" Mr.", " Mrs.", " Dr.")) for s in sentences)
