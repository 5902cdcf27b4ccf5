"""What contenders said, and those answers of an endpoint that are kept, for each was paid for."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lrmt.errors import UsageError, one_line
from lrmt.files import write_whole
from lrmt.tasks.base import Example


class Answer(NamedTuple):
    """What a contender said to one example."""

    index: int
    target: str
    output: str
    question: str
    task: str


def to_answer(index: int, example: Example, output: str = "") -> Answer:
    return Answer(index, example.target, output, example.question, example.task)


class KeptAnswers:
    """What an endpoint answered to a cell so far, by index: a line of `path` each, so that no answer is paid for twice.

    `fresh` forgets what is there. Only a process that is to `write` does so. Of several answers to one index the last counts;
    half a line at the end, of a run that was killed, is asked again. Raises UsageError for a damaged file.
    """

    def __init__(self, path: Path, *, fresh: bool = False, write: bool = True):
        self.path, self.write, self.answers = path, write, {}
        self.size = 0  # bytes of whole lines
        if fresh and write:
            path.unlink(missing_ok=True)
        elif not fresh and path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
            self.size = content.rfind(b"\n") + 1
            lines = content[: self.size].decode().split("\n")[:-1]
            self.answers = {answer.index: answer for answer in (Answer(**json.loads(line)) for line in lines)}
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.path} holds no answers ({one_line(error)}); remove it to ask again") from None

    def add(self, answers: Iterable[Answer]) -> None:
        """Keeps new answers, at the end of the file."""
        new = [answer for answer in answers if self.answers.get(answer.index) != answer]
        self.answers |= {answer.index: answer for answer in new}
        if self.write and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(map(to_line, new)).encode()
            with open(self.path, "ab") as file:
                file.truncate(self.size)  # half a line, if there is one
                file.write(lines)
            self.size += len(lines)

    def settle(self, answers: Iterable[Answer]) -> None:
        """Keeps the answers of all ranks to a cell that is over, in the order of their index."""
        self.answers |= {answer.index: answer for answer in answers}
        if self.write and self.answers:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(to_line(self.answers[index]) for index in sorted(self.answers)))
            self.size = self.path.stat().st_size


def to_line(answer: Answer) -> str:
    return json.dumps(answer._asdict()) + "\n"
