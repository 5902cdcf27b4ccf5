import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lrmt.errors import UsageError
from lrmt.files import digest
from lrmt.tasks import babi, background, prose
from lrmt.tasks.background import Background, ProceduralProse
from lrmt.tasks.base import Pieces
from lrmt.tasks.documents import split_sentences, stream_share, strip_gutenberg
from lrmt.tasks.names import SPLITS
from lrmt.tasks.registry import build_task


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


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "他走进了厨房。天黑了！\n谁在那里？“我。”他说。",
            ["他走进了厨房。", "天黑了！", "谁在那里？", "“我。”", "他说。"],
        ),
        ("他走进了安静\n的厨房。", ["他走进了安静的厨房。"]),  # Han has no space where a line ends
        ("Он вошёл. Она ушла! Кто? Никто.", ["Он вошёл.", "Она ушла!", "Кто?", "Никто."]),
        ("Był w domu. Łódź śpi. Éva też.", ["Był w domu.", "Łódź śpi.", "Éva też."]),
        ("«Où ?» Il partit. À demain, dit-il à Zoé.", ["«Où ?»", "Il partit.", "À demain, dit-il à Zoé."]),
        ("هل أنت هنا؟ نعم. ذهبت إلى البيت۔ ثم عدت.", ["هل أنت هنا؟", "نعم.", "ذهبت إلى البيت۔", "ثم عدت."]),
        ("वह घर गया। फिर आया॥ अब", ["वह घर गया।", "फिर आया॥", "अब"]),
        ("Նա գնաց։ Նա եկավ։", ["Նա գնաց։", "Նա եկավ։"]),
        ("He spoke of it. À propos, she added. Élan.", ["He spoke of it. À propos, she added. Élan."]),  # English
    ],
)
def test_sentences_of_other_scripts(text, sentences):
    if sentences[0].startswith("He "):
        text, sentences = text + " It rained again." * 20, [sentences[0], *["It rained again."] * 20]
    assert split_sentences(text) == sentences


def test_a_text_without_capitals_is_parted_at_its_stops():
    lower = "the old man sat by the window and read his book."
    assert split_sentences(" ".join([lower] * 300)) == [lower] * 300
    short = f"{lower} e.g. {lower}"  # of a length that a sentence may have
    assert split_sentences(short) == [short]


@pytest.mark.parametrize(
    "text",
    ["the lantern stood there " * 2000, "the lantern, the mill, " * 2000, "x" * 50_000, "厨房" * 25_000, "." * 50_000]
    + ["no stop; " * 300 + "the mill stood. " * 500],
)
def test_a_sentence_has_an_end(text):
    sentences = split_sentences(text)
    assert max(map(len, sentences)) <= 3000
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert min(map(len, sentences[:-1])) >= 15  # none so short that it would be left out


@pytest.mark.parametrize("unit", ["厨房", "x.", "a, ", "_", "「", "...?! "])
def test_splitting_takes_no_time_by_the_square_of_the_text(unit):
    begin = time.perf_counter()
    split_sentences(unit * (40_000 // len(unit)))
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("words", "stops", "space"),
    [
        (("他走进了安静的厨房", "她拿起了桌上的苹果", "老人坐在窗边读书"), "。！？", ""),
        (("Он вошёл в тихую кухню и закрыл дверь", "Старик сидел у окна и читал книгу"), ".", " "),
        (("the old man sat by the window and read", "the rain fell on the roof of the old house"), ".", " "),
    ],
)
def test_facts_stand_between_the_sentences_of_any_language(shipped, tmp_path, words, stops, space):
    text = "".join(words[i % len(words)] + stops[i % len(stops)] + space for i in range(3000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    begin = time.perf_counter()
    pool = Background(tmp_path / "book.txt", shipped, tmp_path / "cache")
    task = build_task("qa1", shipped, background=pool, split="test")
    rows = [task.row(index, 4000) for index in range(20)]
    assert time.perf_counter() - begin < 20
    assert len(pool.offsets) == 3001 and np.diff(pool.offsets).max() < 80
    assert {len(Pieces(shipped)(row.input)) for row in rows} == {4000}
    places = [place / 4000 for row in rows for place in row.places]
    assert np.histogram(places, 4, (0, 1))[0].min() >= 5


def test_one_sentence_hides_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    sentence = "The solemn librarian wandered slowly past the old orchard wall."
    (tmp_path / "book.txt").write_text(sentence)
    with pytest.raises(UsageError, match="book.txt is one sentence, and facts stand between sentences; give longer"):
        build_task("qa1", tokenizer, background_dir=tmp_path / "book.txt")
    (tmp_path / "book.txt").write_text(f"{sentence} {sentence}")
    assert build_task("qa1", tokenizer, background_dir=tmp_path / "book.txt").example(0, 400).target in babi.ROOMS


def test_a_book_may_spell_special_tokens(shipped, tmp_path):
    text = "The clerk writes <s>what was old</s> between the marks of <pad> and goes home."
    (tmp_path / "book.txt").write_text(f"{text} {text}")
    pool = Background(tmp_path / "book.txt", shipped, tmp_path / "cache")
    assert not set(shipped.all_special_ids) & set(pool.ids.tolist())
    assert shipped.decode(pool.ids, skip_special_tokens=True).strip() == f"{text} {text}"


def test_strip_gutenberg_keeps_what_lies_between_the_marks():
    body = "\nThe book itself.\n"
    start, end = "*** START OF THIS PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
    assert strip_gutenberg(f"licence\n{start}{body}{end}\nlicence") == body
    assert strip_gutenberg(f"{start}{body}End of Project Gutenberg's X\n\n{end}") == body
    assert strip_gutenberg(body) == body


def sentences_of(passage):
    """The sentences of a passage, as ids or bytes."""
    return passage.split(np.arange(1, len(passage.gaps) - 1))


def test_take_is_exact_and_consecutive(tokenizer, book, tmp_path):
    pool = Background(book, tokenizer, tmp_path / "cache")
    sentences = [" " + s for s in book.read_text().splitlines() if len(Pieces(tokenizer)(s)) >= 10]
    for num_tokens in (1, 9, 500, 3000):
        passage = pool.take(np.random.default_rng(num_tokens), num_tokens)
        taken = sentences_of(passage)
        assert len(passage.content) == sum(map(len, taken)) == num_tokens
        assert passage.gaps.tolist() == [0, *np.cumsum([len(s) for s in taken])]
        texts = [tokenizer.decode(ids) for ids in taken]
        start = next(i for i, s in enumerate(sentences) if s.startswith(texts[0]))
        told = [sentences[(start + i) % len(sentences)] for i in range(len(texts))]
        assert texts[:-1] == told[:-1]
        assert told[-1].startswith(texts[-1].rstrip("\ufffd"))
    assert len(pool.take(np.random.default_rng(0), 0).content) == 0


def test_text_of_exact_length_is_the_same_sentences(tokenizer, book, tmp_path):
    pool = Background(book, tokenizer, tmp_path / "cache")
    for num_tokens in (1, 2, 9, 500, 501, 502, 503, 3000, 2 * len(pool.ids) + 5):
        passage = pool.take_text(np.random.default_rng(num_tokens), num_tokens)
        text = bytes(passage.content).decode()
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == num_tokens == passage.gaps[-1]
        assert text.startswith(" ") and not text[-1].isspace()
        ids = pool.take(np.random.default_rng(num_tokens), num_tokens)
        assert np.array_equal(passage.gaps[:-1], ids.gaps[: len(passage.gaps) - 1])
        for whole, sentence in zip(sentences_of(ids)[:-1], sentences_of(passage), strict=False):
            assert tokenizer.decode(whole) == bytes(sentence).decode()
    assert pool.take_text(np.random.default_rng(0), 0).content.tolist() == []


def test_text_is_exact_where_no_beginning_of_a_sentence_has_the_tokens(tmp_path):
    """A tokenizer of bytes cannot make one token of a space and a letter: the sentence before is given up too."""
    backend = Tokenizer(models.BPE(vocab={chr(i): i for i in range(32, 127)}, merges=[]))
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="~")
    (tmp_path / "book.txt").write_text("\n\n".join(f"Ship {'a' * (10 + i)} sank." for i in range(30)))
    pool = Background(tmp_path / "book.txt", letters, tmp_path / "cache")
    for seed in range(100):
        passage = pool.take_text(np.random.default_rng(seed), 100)
        assert len(letters(bytes(passage.content).decode())["input_ids"]) == 100
    with pytest.raises(UsageError, match="no beginning of a sentence of .* has 1 tokens; give a greater length"):
        pool.take_text(np.random.default_rng(0), 1)


def test_take_wraps_around_the_last_book(tokenizer, tmp_path):
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (tmp_path / name).write_text("\n".join(prose.write(20, seed)))
    pool = Background(tmp_path, tokenizer, tmp_path / "cache")
    total = len(pool.ids)
    passage = pool.take(np.random.default_rng(3), 3 * total + 17)
    taken = passage.content
    assert len(taken) == 3 * total + 17 == passage.gaps[-1]
    assert np.array_equal(taken[:total], taken[total : 2 * total])
    assert sorted(taken[:total]) == sorted(pool.ids)
    pool.reserve(total)
    with pytest.raises(UsageError, match=rf"has {total:,} tokens, fewer than the .* --repeat_background"):
        pool.reserve(total + 1)


def test_every_book_is_as_likely_whatever_its_size(tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(prose.write(500, 1)))
    (tmp_path / "short.txt").write_text("\n".join(prose.write(20, 2)))
    pool = Background(tmp_path, tokenizer, tmp_path / "cache")
    (_, border), _ = pool.books
    rng = np.random.default_rng(0)
    starts = [pool.take(rng, 1).content.__array_interface__["data"][0] for _ in range(400)]
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


@pytest.mark.parametrize("part", ["meta.json", "ids.npy", "text.npy", "offsets.npy"])
def test_a_damaged_cache_is_made_again(tokenizer, book, tmp_path, part):
    ids = Background(book, tokenizer, tmp_path / "cache").ids.copy()
    (folder,) = (tmp_path / "cache").iterdir()
    stored = (folder / part).read_bytes()
    (folder / part).write_bytes(stored[: len(stored) - 9])
    assert np.array_equal(Background(book, tokenizer, tmp_path / "cache").ids, ids)
    assert (folder / part).read_bytes() == stored
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_of_another_tokenizer_is_refused_and_kept(tokenizer, other_tokenizer, book, tmp_path):
    Background(book, tokenizer, tmp_path / "cache")
    (mine,) = (tmp_path / "cache").iterdir()
    Background(book, other_tokenizer, tmp_path / "cache")
    (other,) = set((tmp_path / "cache").iterdir()) - {mine}
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    with pytest.raises(UsageError, match=f"{mine.name} was written by another tokenizer; remove it, or set LRMT_CACHE"):
        Background(book, tokenizer, tmp_path / "cache")
    assert sorted(f.name for f in mine.iterdir()) == sorted(f.name for f in other.iterdir())


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
    assert len(one.take(np.random.default_rng(0), 700).content) == 700


def test_prose_grows_without_an_end_and_without_changing_what_was_there(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    small, grown = (ProceduralProse(tokenizer, seed=3, num_sentences=100) for _ in range(2))
    block = len(small.ids)
    grown.reserve(5 * block)
    assert len(grown.ids) > 5 * block and np.array_equal(grown.ids[:block], small.ids)
    for num_tokens in (10, block, 4 * block):
        passages = [pool.take(np.random.default_rng(num_tokens), num_tokens) for pool in (small, grown)]
        assert np.array_equal(passages[0].content, passages[1].content)
    taken = passages[0]
    assert len({bytes(s) for s in sentences_of(taken)}) > 0.95 * len(sentences_of(taken))  # nothing is repeated
    again = ProceduralProse(tokenizer, seed=3, num_sentences=100)
    monkeypatch.setattr(background, "_tokenise", None)  # what it grows by is in the cache
    assert np.array_equal(again.take(np.random.default_rng(4 * block), 4 * block).content, taken.content)


def test_a_data_set_is_read_until_there_is_enough(tokenizer, tmp_path, monkeypatch):
    rows = [{"text": " ".join(prose.write(40, seed))} for seed in range(8)]
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = Background.from_dataset(str(path), tokenizer, cache_dir=tmp_path / "cache")
    assert len(whole.books) == 6
    half = Background.from_dataset(str(path), tokenizer, num_tokens=len(whole.ids) // 2, cache_dir=tmp_path / "cache")
    assert len(half.books) in (3, 4) and np.array_equal(half.ids, whole.ids[: len(half.ids)])
    monkeypatch.setattr(background, "_tokenise", None)
    again = Background.from_dataset(str(path), tokenizer, cache_dir=tmp_path / "cache")
    assert np.array_equal(again.ids, whole.ids)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="cannot load --background_dataset .*nowhere.* of split train"):
        Background.from_dataset(str(tmp_path / "nowhere"), tokenizer, cache_dir=tmp_path / "cache")
    path.write_text('{"body": "x"}\n')
    with pytest.raises(UsageError, match="row 1 has no column 'text'; found: body"):
        Background.from_dataset(str(path), tokenizer, cache_dir=tmp_path / "cache")


def test_books_of_a_data_set_are_of_one_split_alone(monkeypatch):
    def documents(split, splits):
        monkeypatch.setattr("datasets.load_dataset", lambda name, config, streaming: splits)
        return list(stream_share("org/books", None, split, "--background_dataset"))

    def rows(name, count=30):
        return [{"text": f"{name} {n}"} for n in range(count)]

    for splits in ({"train": rows("a")}, {"all": rows("a")}):  # shares
        found = {split: set(documents(split, splits)) for split in SPLITS}
        assert sum(map(len, found.values())) == len(set.union(*found.values())) == 30
        assert found["test"] == {"a 1", "a 11", "a 21"} and len(found["validation"]) == 3
    splits = {"train": rows("a"), "test": rows("b", 2)}  # its own, where there is one
    assert documents("test", splits) == ["b 0", "b 1"]
    assert documents("validation", splits) == ["a 2", "a 12", "a 22"]
    assert len(documents("train", splits)) == 27 and "a 1" in documents("train", splits)
    with pytest.raises(UsageError, match="--background_dataset org/books of split test has no document"):
        documents("test", {"train": rows("a", 1)})


def test_books_are_hashed_one_at_a_time(tokenizer, tmp_path, monkeypatch):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("The mill stood idle. " * 50_000 + str(number))  # 1 MB
    opened = []
    monkeypatch.setattr(Background, "_open", lambda self, *given: opened.append(given[2]))
    tracemalloc.start()
    Background(tmp_path, tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert opened == [digest(*(file.read_text() for file in sorted(tmp_path.iterdir())))]


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


def test_a_script_without_stops_is_cut_into_pieces():
    """Thai parts neither words nor sentences; a whole paragraph would leave facts no place but before and behind it."""
    paragraph = "คนแก่นั่งอยู่ที่หน้าต่างและอ่านหนังสือของเขา" * 30
    pieces = split_sentences(f"{paragraph}\n\n{paragraph}")
    assert len(pieces) >= 6 and "".join(pieces) == paragraph * 2
