"""Language modelling on any text: every token but the first is to be predicted."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from lrmt.errors import UsageError
from lrmt.tasks.base import Example, Task, derive_rng, encode_plain, hold_out
from lrmt.tasks.dataset import looks_local
from lrmt.tasks.documents import read_documents, stream_documents, text_files
from lrmt.tasks.options import TaskOptions

MAX_HUB_TOKENS = 2**24  # of a Hub data set, which may be larger than any disk
_BATCH = 64  # documents tokenised at once


class TextTask(Task):
    """Windows of consecutive tokens at drawn places of one long text: the documents in order, EOS between them.

    `text_path` is a folder of .txt files, a .txt file, a .jsonl file with column text, or a Hub dataset id with
    `dataset_config` and `dataset_split` (default train), of which the first 2**24 tokens are read. Train leaves out the last
    tenth of the tokens, which is validation; test is all of them.
    Raises UsageError for anything missing, unreadable or empty.
    """

    name = "text"
    max_new_tokens = 0  # nothing is generated

    def __init__(
        self,
        tokenizer,
        options: TaskOptions,
        *,
        split: str = "train",
        seed: int = 0,
        segment_length: int | None = None,  # of any length here
    ):
        if not options.text_path:
            raise UsageError("task text needs --text_path: a folder of .txt files, a .txt or .jsonl file, or a Hub id")
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no EOS token, which stands between documents; set tokenizer.eos_token")
        self.source, self.split, self.seed = str(options.text_path), split, seed
        if looks_local(self.source):
            tokens = _local_tokens(self.source, tokenizer)
        else:
            tokens = _hub_tokens(self.source, options.dataset_config, options.dataset_split or "train", tokenizer)
        if not len(tokens):
            raise UsageError(f"--text_path {self.source} holds no text; give one that is not empty")
        self.tokens = tokens if split == "test" else hold_out(tokens, split)  # int32 [N]

    def example(self, index: int, length: int) -> Example:
        """A window of `length` tokens: the first is the prompt, the others the answer.

        Raises UsageError when the text is shorter than that.
        """
        places = len(self.tokens) - length + 1
        if places < 1:
            raise UsageError(
                f"--text_path {self.source} has {len(self.tokens)} tokens for split {self.split}, fewer than one text of "
                f"{length}; give more text, or ask for shorter ones"
            )
        start = int(derive_rng(self.seed, self.split, self.name, length, index).integers(places))
        ids = self.tokens[start : start + length].astype(np.int64)
        return Example(ids[:1], ids[1:], "", "", self.name)


def _local_tokens(source: str, tokenizer) -> np.ndarray:
    path = Path(source).expanduser()
    files = text_files([path], flag="--text_path")
    for file in files:
        if file.suffix.lower() not in (".txt", ".jsonl"):
            raise UsageError(f"--text_path {file} is neither .txt nor .jsonl; convert it to one of them")
    stats = [file.stat() for file in files]
    return _file_tokens(tuple(files), tuple((s.st_mtime_ns, s.st_size) for s in stats), tokenizer)


@lru_cache(maxsize=2)  # the splits of a run share one array
def _file_tokens(files: tuple[Path, ...], stamps: tuple, tokenizer) -> np.ndarray:
    """Ids of the files, which `stamps` tell from what they held before."""
    return _tokenise((text for file in files for text in read_documents(file, "--text_path")), tokenizer)


@lru_cache(maxsize=2)
def _hub_tokens(name: str, config: str | None, split: str, tokenizer) -> np.ndarray:
    return _tokenise(stream_documents(name, config, split, "--text_path"), tokenizer, MAX_HUB_TOKENS)


def _tokenise(texts: Iterable[str], tokenizer, limit: int | None = None) -> np.ndarray:
    """Ids int32 [N] of the documents, EOS between them, at most `limit`; read-only, for it is shared."""
    parts, count, texts = [np.empty(0, dtype=np.int32)], 0, iter(texts)
    while (limit is None or count < limit) and (batch := list(islice(texts, _BATCH))):
        for ids in encode_plain(tokenizer, batch):
            if ids:
                parts.append(np.array([tokenizer.eos_token_id, *ids] if count else ids, dtype=np.int32))
                count += len(parts[-1])
    tokens = np.concatenate(parts)[:limit]
    tokens.setflags(write=False)
    return tokens
