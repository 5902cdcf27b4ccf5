"""A small byte-fallback BPE tokenizer, trained here on the tasks' own words."""

import functools
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lrmt
from lrmt.tasks import babi, passkey, prose


def make_tokenizer(vocab_size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    texts = prose.write(1500, seed) + [passkey.WORDINGS["plain"], passkey.KEY, passkey.QUESTION, *passkey.FILLER]
    for task in ("qa1", "qa2", "qa3"):
        for sample in babi.simulate(task, 20, seed):
            texts += [*sample.facts, sample.question, sample.answer]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    backend.train_from_iterator([f" {text.strip()}" for text in texts] + list("0123456789"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(1024)


@pytest.fixture(scope="session")
def other_tokenizer():
    return make_tokenizer(700)


@pytest.fixture(scope="session")
def shipped():
    """The tokenizer of the tiny LLaMA, whose bytes are no special tokens."""
    return AutoTokenizer.from_pretrained(Path(lrmt.__file__).parent / "assets" / "tiny-llama")


@pytest.fixture
def book(tmp_path):
    """A text file of 400 sentences."""
    path = tmp_path / "book.txt"
    path.write_text("\n".join(prose.write(400, 7)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def official(data_dir):
    """The training and validation questions of a task's official files."""
    folder = data_dir / "babi"
    if not folder.is_dir():
        pytest.skip(f"no bAbI files in {folder}; set LRMT_DATA")

    @functools.cache
    def read(task: str) -> list[babi.BabiSample]:
        return [sample for split in ("train", "valid") for sample in babi.read(folder / f"{task}_{split}.txt")]

    return read


@pytest.fixture(scope="session")
def simulated():
    """Questions of 2,000 simulated stories of a task."""
    return functools.cache(lambda task: babi.simulate(task, 2000, seed=5))
