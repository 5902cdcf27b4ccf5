"""Retrieval baseline: the passages of the text that fit a question best, instead of the text."""

from collections.abc import Callable, Sequence

import numpy as np

from lrmt.errors import UsageError, one_line
from lrmt.tasks.background import split_sentences
from lrmt.tasks.base import Example, Pieces, join


class Retriever:
    """What of an example a backbone is shown: the `top_k` best passages of its context, and its question.

    Args:
        window: tokens that the backbone sees, its answer included; passages that do not fit any more are left out, the best
            ones stay.
        chunks: "sentences", or tokens per passage.
        order: "document" (bAbI needs time), or "similarity", best first.
        rank: `(passages, question) -> scores [n]`, higher is better; `bm25` or `embedding_ranker(model)`.

    Calling it raises UsageError where question, answer and a single passage of `chunks` tokens do not fit.
    """

    def __init__(self, tokenizer, window: int, *, chunks="sentences", top_k=5, order="document", rank=None):
        self.tokenizer, self.pieces, self.window = tokenizer, Pieces(tokenizer), window
        self.chunks, self.top_k, self.order, self.rank = chunks, top_k, order, rank or bm25

    def __call__(self, example: Example, max_new_tokens: int = 0) -> np.ndarray:
        """Token ids `[P]` of passages and question, P <= window - max_new_tokens."""
        question, window = self.pieces(example.question), self.window - max_new_tokens
        if self.chunks != "sentences" and self.chunks + len(question) > window:
            raise UsageError(
                f"--rag_chunks {self.chunks} does not fit into the backbone's window of {self.window} tokens beside a question "
                f"of {len(question)} and an answer of {max_new_tokens}; lower it to {window - len(question)} or less"
            )
        passages = self._split(context_ids(example, self.pieces))
        if not passages:
            return question[-window:]
        scores = np.asarray(self.rank([self.tokenizer.decode(ids).strip() for ids in passages], example.question))
        room, chosen = window - len(question), []
        for best in np.lexsort((-np.arange(len(scores)), -scores))[: self.top_k].tolist():  # of equal ones the latest
            if len(passages[best]) <= room:
                chosen.append(best)
                room -= len(passages[best])
        if self.order == "document":
            chosen.sort()
        return join([*(passages[i] for i in chosen), question])[-window:]

    def _split(self, context: np.ndarray) -> list[np.ndarray]:
        if self.chunks != "sentences":
            return [context[at : at + self.chunks] for at in range(0, len(context), self.chunks)]
        return self.pieces.encode(split_sentences(self.tokenizer.decode(context, skip_special_tokens=False)))


def context_ids(example: Example, pieces: Pieces) -> np.ndarray:
    """The prompt without the question, be it at the end, at the beginning or at both."""
    question, ids = pieces(example.question), example.prompt_ids
    if np.array_equal(ids[-len(question) :], question):
        ids = ids[: -len(question)]
    return ids[len(question) :] if np.array_equal(ids[: len(question)], question) else ids


def bm25(passages: Sequence[str], question: str) -> np.ndarray:
    """Okapi BM25 of each passage (Robertson & Zaragoza 2009), English stop words left out: `[n]`."""
    (bm25s,) = require("rag", "bm25s")

    def tokenize(texts):
        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    words, (asked,) = tokenize(passages), tokenize([question])
    known = [word for word in asked if any(word in passage for passage in words)]
    if not known:
        return np.zeros(len(passages))
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return index.get_scores(known)


def embedding_ranker(model_name_or_path: str, device: str = "cpu") -> Callable[[Sequence[str], str], np.ndarray]:
    """Cosine similarity of a sentence-transformers model, by a FAISS index over the passages."""
    faiss, encoders = require("rag", "faiss", "sentence_transformers")
    try:
        encoder = encoders.SentenceTransformer(model_name_or_path, device=device)
    except (OSError, ValueError) as error:
        raise UsageError(f"--rag_model {model_name_or_path} cannot be loaded ({one_line(error)})") from None

    def encode(texts):
        return encoder.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True).astype(np.float32)

    def rank(passages, question):
        vectors = encode(passages)
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        scores, found = index.search(encode([question]), len(passages))
        ranked = np.empty(len(passages), dtype=np.float32)
        ranked[found[0]] = scores[0]
        return ranked

    return rank


def require(extra: str, *modules: str) -> list:
    """Imports the modules of an optional extra; raises UsageError with the command that installs it."""
    import importlib

    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; pip install 'lrmt[{extra}]'") from None
