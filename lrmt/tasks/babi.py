"""bAbI stories: read the official text files, simulate qa1-qa3 without them, and solve qa1-qa3 by replay.

The simulator reproduces the measured statistics of the v1.2 English files (grammar, cadence, choice of questions,
labels, support); the solver reads nothing but text, so that each can be tested against the other and the files.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrmt.errors import UsageError

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
GO = ("went to", "moved to", "journeyed to", "travelled to", "went back to")
GET = ("got", "grabbed", "picked up", "took")
DROP = ("discarded", "dropped", "left", "put down")

SIMULATED = ("qa1", "qa2", "qa3")
QUESTIONS_PER_STORY = 5
WINDOW = 5  # a question is about one of the last five statements
DROP_THERE = 0.2
GET_THERE = {"qa2": 1.0, "qa3": 0.2}


@dataclass(frozen=True)
class BabiSample:
    """One question with every statement of its story told before it; `support` are indices into `facts`."""

    facts: tuple[str, ...]
    question: str  # with the trailing space of the files
    answer: str
    support: tuple[int, ...]


def read(path: str | Path) -> list[BabiSample]:
    """Read an official bAbI file: one sample per question, in file order, questions dropped from the facts.

    Raises UsageError when the file is missing, empty or not in bAbI's format.
    """
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.txt"))) or "no .txt file"
        raise UsageError(f"no bAbI file {path}; {path.parent} holds: {there}")
    samples: list[BabiSample] = []
    facts: list[str] = []
    index_of: dict[int, int] = {}  # line id -> index of the fact
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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


def simulate(task: str, num_stories: int, seed: int | str) -> list[BabiSample]:
    """Simulate `num_stories` stories of qa1, qa2 or qa3, five questions each, reproducible for a seed."""
    rng = random.Random(f"{task}/{seed}")
    return [sample for _ in range(num_stories) for sample in simulate_story(task, rng)]


def simulate_story(task: str, rng: random.Random, num_questions: int = QUESTIONS_PER_STORY) -> list[BabiSample]:
    """Simulate one story up to its `num_questions`-th question.

    Statements come in pairs; after each pair the statements of the window are tried in random order, and the first
    that allows a question is asked about.
    """
    if task not in SIMULATED:
        raise UsageError(f"cannot simulate {task!r}, only {', '.join(SIMULATED)}; give --babi_dir with the bAbI files")
    world = _World(task, rng)
    samples: list[BabiSample] = []
    while len(samples) < num_questions:
        world.tell()
        world.tell()
        window = world.events[-WINDOW:]
        rng.shuffle(window)
        for person, thing in window:
            asked = world.ask(person, thing)
            if asked:
                samples.append(BabiSample(tuple(world.facts), *asked))
                break
    return samples


class _World:
    """Who is where and holds what; where everyone starts is never told."""

    def __init__(self, task: str, rng: random.Random):
        self.task, self.random = task, rng.random
        self.actions = (self._move,) if task == "qa1" else (self._move, self._get, self._drop)
        self.ask = {"qa1": self._ask_person, "qa2": self._ask_object, "qa3": self._ask_before}[task]
        self.facts: list[str] = []
        self.events: list[tuple[str, str | None]] = []  # (person, object got or dropped, None for a move)
        self.room = {person: self._pick(ROOMS) for person in PEOPLE}
        self.place = {thing: self._pick(ROOMS) for thing in OBJECTS}  # a room, or the person who holds it
        self.room_told: list[str | None] = []  # room named by each statement, None for get and drop
        self.last_move: dict[str, list[int]] = {person: [] for person in PEOPLE}  # at most one statement each
        self.last_touch: dict[str, int] = {}  # object -> its last get or drop
        self.origin: dict[str, list[int]] = {}  # dropped object -> the dropper's last move before, if any
        self.carried: dict[str, list[int]] = {}  # object -> moves of its last carrier while he carried it

    def _pick(self, options: Sequence[str]) -> str:
        return options[int(self.random() * len(options))]

    def tell(self) -> None:
        """Append one statement; whatever is impossible is drawn again from the person on."""
        while True:
            person = self._pick(PEOPLE)
            if self.actions[int(self.random() * len(self.actions))](person):
                return

    def _append(self, person: str, thing: str | None, room: str | None, text: str) -> bool:
        self.events.append((person, thing))
        self.room_told.append(room)
        self.facts.append(text)
        return True

    def _move(self, person: str) -> bool:
        room = self._pick(ROOMS)
        if room == self.room[person]:
            return False
        self.room[person] = room
        self.last_move[person] = [len(self.facts)]
        for thing, place in self.place.items():
            if place == person:
                self.carried[thing].append(len(self.facts))
        return self._append(person, None, room, f"{person} {self._pick(GO)} the {room}.")

    def _get(self, person: str) -> bool:
        here = [thing for thing, place in self.place.items() if place == self.room[person]]
        if not here:
            return False
        thing = self._pick(here)
        self.place[thing], self.carried[thing], self.last_touch[thing] = person, [], len(self.facts)
        there = " there" if self.random() < GET_THERE[self.task] else ""
        return self._append(person, thing, None, f"{person} {self._pick(GET)} the {thing}{there}.")

    def _drop(self, person: str) -> bool:
        held = [thing for thing, place in self.place.items() if place == person]
        if not held:
            return False
        thing = self._pick(held)
        self.place[thing], self.origin[thing] = self.room[person], self.last_move[person]
        self.last_touch[thing] = len(self.facts)
        there = " there" if self.random() < DROP_THERE else ""
        return self._append(person, thing, None, f"{person} {self._pick(DROP)} the {thing}{there}.")

    # Each returns (question, answer, support), or None when the statement allows no question.

    def _ask_person(self, person: str, thing: str | None):
        return f"Where is {person}? ", self.room[person], tuple(self.last_move[person])

    def _ask_object(self, person: str, thing: str | None):
        if thing is None:
            return None
        held = self.place[thing] in PEOPLE
        told = self.carried[thing][-1:] if held else self.origin[thing]
        if not told:
            return None
        return f"Where is the {thing}? ", self.room_told[told[0]], (self.last_touch[thing], told[0])

    def _ask_before(self, person: str, thing: str | None):
        if thing is None or len(self.carried[thing]) < 2:
            return None
        moves = self.carried[thing]
        room = self.room_told[moves[1 + int(self.random() * (len(moves) - 1))]]
        last = max(j for j, move in enumerate(moves) if self.room_told[move] == room)
        answer = self.room_told[moves[last - 1]]
        support = (self.last_touch[thing], moves[last], moves[last - 1])
        return f"Where was the {thing} before the {room}? ", answer, support


_STATEMENT = re.compile(
    rf"(?P<person>\w+) (?:(?P<go>{'|'.join(GO)})|(?P<get>{'|'.join(GET)})|(?P<drop>{'|'.join(DROP)}))"
    r" the (?P<thing>\w+)(?: there)?\."
)
_QUESTION = {
    "qa1": re.compile(r"Where is (?P<thing>\w+)\?"),
    "qa2": re.compile(r"Where is the (?P<thing>\w+)\?"),
    "qa3": re.compile(r"Where was the (?P<thing>\w+) before the (?P<room>\w+)\?"),
}


def solve(facts: Sequence[str], question: str, task: str) -> tuple[str, tuple[int, ...]]:
    """Answer a question of qa1-qa3 from the text alone: (answer, support as indices into `facts`).

    Raises ValueError for a sentence outside the grammar or a question that the story does not answer.
    """
    asked = _QUESTION[task].fullmatch(question.strip())
    told = [_STATEMENT.fullmatch(fact.strip()) for fact in facts]
    if asked is None or None in told:
        raise ValueError(f"not a story and question of {task}: {facts!r} {question!r}")

    def moves_of(person: str, start: int, stop: int) -> list[int]:
        return [i for i in range(start, stop) if told[i]["go"] and told[i]["person"] == person]

    thing = asked["thing"]
    if task == "qa1":
        moves = moves_of(thing, 0, len(told))
        if not moves:
            raise ValueError(f"nobody told where {thing} is")
        return told[moves[-1]]["thing"], (moves[-1],)

    touches = [i for i, fact in enumerate(told) if fact["thing"] == thing and not fact["go"]]
    if not touches:
        raise ValueError(f"nobody touched the {thing}")
    touch = touches[-1]
    dropped = bool(told[touch]["drop"])
    carrier, end = told[touch]["person"], touch if dropped else len(told)
    if task == "qa2":
        moves = moves_of(carrier, 0 if dropped else touch, end)
        if not moves:
            raise ValueError(f"the room of the {thing} is unknown")
        return told[moves[-1]]["thing"], (touch, moves[-1])

    start = max(i for i in touches if told[i]["get"])
    moves = moves_of(carrier, start, end)
    later = [j for j in range(1, len(moves)) if told[moves[j]]["thing"] == asked["room"]]
    if not later:
        raise ValueError(f"the {thing} was not carried to the {asked['room']} from another room")
    j = later[-1]
    return told[moves[j - 1]]["thing"], (touch, moves[j], moves[j - 1])
