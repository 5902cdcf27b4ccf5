"""The official bAbI text files, and the sample that they and the simulator share."""

from dataclasses import dataclass
from pathlib import Path

from lrmt.errors import UsageError
from lrmt.files import listing, read_text


@dataclass(frozen=True)
class BabiSample:
    """One question with every statement of its story told before it; `support` are indices into `facts`."""

    facts: tuple[str, ...]
    question: str  # with the trailing space of the files, where they have one
    answer: str
    support: tuple[int, ...]


def read(path: str | Path) -> list[BabiSample]:
    """Read an official bAbI file: one sample per question, in file order, questions dropped from the facts.

    Raises UsageError when the file is missing, empty or not in bAbI's format.
    """
    path = Path(path)
    if not path.is_file():
        there = listing(path.parent, "*.txt", empty="no .txt file")
        raise UsageError(f"no bAbI file {path}; {path.parent} holds: {there}")
    samples: list[BabiSample] = []
    facts: list[str] = []
    index_of: dict[int, int] = {}  # line id -> index of the fact
    for number, line in enumerate(read_text(path, "--babi_dir").splitlines(), start=1):
        if not line.strip():
            continue
        identifier, _, text = line.partition(" ")
        if not identifier.isdigit() or not text:
            raise UsageError(f"{path}:{number}: expected `<id> <sentence>`, got {line[:60]!r}; is this a bAbI file?")
        if identifier == "1":
            facts, index_of = [], {}
        if "\t" not in text:
            index_of[int(identifier)] = len(facts)
            facts.append(text.rstrip())
            continue
        try:
            question, answer, support = text.split("\t")
            indices = tuple(index_of[int(i)] for i in support.split())
        except (ValueError, KeyError):
            raise UsageError(f"{path}:{number}: expected `question<TAB>answer<TAB>ids`, got {line[:60]!r}") from None
        samples.append(BabiSample(tuple(facts), question, answer, indices))
    if not samples:
        raise UsageError(f"{path} holds no question; give a bAbI file such as qa1_train.txt")
    return samples
