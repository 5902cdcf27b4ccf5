"""Retrieval: which passages are shown, in which order, and that they fit."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lrmt.errors import UsageError
from lrmt.evaluation.rag import Retriever, bm25, context_ids, embedding_ranker, require
from lrmt.tasks.base import Example, Pieces, join

ASSETS = Path(__file__).parents[2] / "lrmt" / "assets"
CONTEXT = [
    "The rain fell on the empty road all night.",
    "Mary went to the kitchen.",
    "Nobody had seen the captain since the storm.",
    "Mary went to the garden.",
    "John travelled to the office.",
    "A lamp burned in the window of the inn.",
]
QUESTION = "Where is Mary?"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny-llama")


def example(tokenizer, context=CONTEXT, question=QUESTION):
    pieces = Pieces(tokenizer)
    return Example(join([*map(pieces, context), pieces(question)]), pieces.answer("garden"), question, "garden", "qa1")


def show(tokenizer, window=200, context=CONTEXT, **options):
    ids = Retriever(tokenizer, window, **options)(example(tokenizer, context))
    assert len(ids) <= window
    return tokenizer.decode(ids).strip()


def test_sentences_about_the_question_in_the_order_of_the_text(tokenizer):
    assert show(tokenizer, top_k=2) == "Mary went to the kitchen. Mary went to the garden. Where is Mary?"


def test_of_equal_sentences_the_latest_comes_first(tokenizer):
    assert show(tokenizer, top_k=1) == "Mary went to the garden. Where is Mary?"
    assert show(tokenizer, top_k=2, order="similarity").startswith("Mary went to the garden. Mary went to the kitchen.")


def test_the_best_stay_when_the_window_is_small(tokenizer):
    needed = len(Pieces(tokenizer)("Mary went to the garden.")) + len(Pieces(tokenizer)(QUESTION))
    assert show(tokenizer, window=needed, top_k=5) == "Mary went to the garden. Where is Mary?"
    assert show(tokenizer, window=needed - 1, top_k=1) == QUESTION


def test_there_is_room_for_the_answer_and_for_one_passage(tokenizer):
    asked = len(Pieces(tokenizer)(QUESTION))
    assert len(Retriever(tokenizer, 8 + asked + 20, chunks=8)(example(tokenizer), 20)) == 8 + asked
    with pytest.raises(UsageError, match=f"--rag_chunks 8 does not fit .* {8 + asked + 19} .*; lower it to 7 or less"):
        Retriever(tokenizer, 8 + asked + 19, chunks=8)(example(tokenizer), 20)


@pytest.mark.parametrize("position", ["last", "first", "both", "alone"])
def test_the_question_is_no_passage_wherever_it_stands(tokenizer, position):
    pieces, plain = Pieces(tokenizer), example(tokenizer)
    context, question = join(map(pieces, CONTEXT)), pieces(QUESTION)
    before, after = (
        [question] if position in where else [] for where in (("first", "both"), ("last", "both", "alone"))
    )
    context = context[:0] if position == "alone" else context
    asked = Example(join([*before, context, *after]), plain.answer_ids, QUESTION, "garden", "qa1")
    assert np.array_equal(context_ids(asked, pieces), context)
    assert tokenizer.decode(Retriever(tokenizer, 200, top_k=6)(asked)).count(QUESTION) == 1


def test_passages_of_so_many_tokens(tokenizer):
    ids = example(tokenizer).prompt_ids
    asked = Pieces(tokenizer)(QUESTION)
    retriever = Retriever(tokenizer, 200, chunks=8, top_k=100)
    passages = retriever._split(ids[: -len(asked)])
    assert {len(p) for p in passages[:-1]} == {8}
    assert np.array_equal(join(passages), ids[: -len(asked)])
    assert np.array_equal(retriever(example(tokenizer)), ids)  # all of them, in order, is the text


def test_special_tokens_in_a_text_are_shown(tokenizer):
    assert show(tokenizer, top_k=1, context=[*CONTEXT, "Mary wrote <s> there."]).startswith("Mary wrote <s> there.")


def test_a_text_without_context(tokenizer):
    assert show(tokenizer, context=[]) == QUESTION


def test_bm25_ranks_by_rare_words_and_is_zero_where_nothing_fits():
    scores = bm25(CONTEXT, QUESTION)
    assert scores.shape == (6,) and scores[1] == scores[3] > 0 == max(scores[[0, 2, 4, 5]])
    assert not bm25(CONTEXT, "What about zebras?").any()
    assert not bm25(["the of"], "the").any()


def test_embeddings_rank_by_cosine(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    word = Transformer(str(ASSETS / "tiny-llama"), max_seq_length=64)
    word.tokenizer.pad_token = word.tokenizer.pad_token or word.tokenizer.eos_token
    SentenceTransformer(modules=[word, Pooling(word.get_word_embedding_dimension())]).save(str(tmp_path / "encoder"))
    scores = embedding_ranker(str(tmp_path / "encoder"))(CONTEXT, QUESTION)
    vectors = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode([*CONTEXT, QUESTION])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(scores, vectors[:-1] @ vectors[-1], atol=1e-5)
    assert len(set(scores.tolist())) == 6


def test_an_encoder_that_is_not_there_and_an_extra_that_is_not_installed(tmp_path):
    with pytest.raises(UsageError, match="--rag_model .*nowhere cannot be loaded"):
        embedding_ranker(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"no_such_module is not installed; pip install 'lrmt\[rag\]'"):
        require("rag", "no_such_module")
