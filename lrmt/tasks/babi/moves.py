"""Moves told in other words: negation, alternatives, pronouns, pairs of people, times (qa9-qa14)."""

import random
from collections.abc import Iterator

from lrmt.tasks.babi.files import BabiSample
from lrmt.tasks.babi.vocabulary import GO, THEN, TIMES, Words
from lrmt.tasks.babi.world import WINDOW, Asked, ask_in_window, pick


def story(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """Endless questions of one story of qa9-qa13."""
    kinds = {"qa9": _Unsure, "qa10": _Unsure, "qa11": _Together, "qa12": _Together, "qa13": _Together}
    return ask_in_window(kinds[task](task, rng, words), rng)


class _Unsure:
    """qa9 and qa10: everyone moves as in qa1, but a quarter of the statements do not tell where to."""

    def __init__(self, task: str, rng: random.Random, words: Words):
        self.rng, self.negative, self.rooms, self.people = rng, task == "qa9", words.rooms, tuple(words.people)
        self.room = {person: pick(rng, self.rooms) for person in self.people}
        self.facts: list[str] = []
        self.events: list[tuple[str]] = []
        self.latest: dict[str, tuple[int, str, tuple[str, ...]]] = {}  # person -> (statement, kind, rooms named)

    def tell(self) -> None:
        rng = self.rng
        person = pick(rng, self.people)
        left = self.room[person]
        room = self.room[person] = pick(rng, [room for room in self.rooms if room != left])
        kind = pick(rng, ("go", "go", "is", "unsure"))
        if kind == "go":
            rooms, text = (room,), f"{pick(rng, GO)} the {room}"
        elif kind == "is":
            rooms, text = (room,), f"is in the {room}"
        elif self.negative:
            rooms, text = (left,), f"is {pick(rng, ('no longer', 'not'))} in the {left}"
        else:
            rooms = [room, pick(rng, self.rooms)]  # may name one room twice, as the files do
            rng.shuffle(rooms)
            text = f"is either in the {rooms[0]} or the {rooms[1]}"
        self.latest[person] = (len(self.facts), kind, tuple(rooms))
        self.events.append((person,))
        self.facts.append(f"{person} {text}.")

    def ask(self, person: str) -> Asked:
        line, kind, rooms = self.latest[person]
        room = self.room[person]
        if kind == "unsure" and self.negative:
            room, answer = rooms[0], "no"
        else:
            if self.rng.random() < 0.5:
                room = pick(self.rng, [other for other in self.rooms if other != room])
            answer = ("maybe" if kind == "unsure" else "yes") if room in rooms else "no"
        return f"Is {person} in the {room}? ", answer, (line,)


class _Together:
    """qa11-qa13: each statement moves one or two people; in qa11 and qa13 every second one goes on with a pronoun."""

    def __init__(self, task: str, rng: random.Random, words: Words):
        self.rng, self.rooms, self.people = rng, words.rooms, words.people
        self.size, self.goes_on = 1 if task == "qa11" else 2, task != "qa12"
        self.room = {person: pick(rng, self.rooms) for person in self.people}
        self.facts: list[str] = []
        self.events: list[tuple[str]] = []  # one for each person of a statement
        self.latest: dict[str, tuple[int, ...]] = {}  # person -> the statements that tell where he is
        self.group: list[str] = []

    def tell(self) -> None:
        rng, line = self.rng, len(self.facts)
        again = self.goes_on and line % 2 == 1
        while True:  # whatever is impossible is drawn again from the people on
            if not again:
                self.group = rng.sample(list(self.people), self.size)
            room = pick(rng, self.rooms)
            if all(self.room[person] != room for person in self.group):
                break
        who = " and ".join(self.group)
        if again:
            who = f"{pick(rng, THEN)} {'they' if self.size == 2 else self.people[who]}"
        for person in self.group:
            self.room[person] = room
            self.latest[person] = (line - 1, line) if again else (line,)
            self.events.append((person,))
        self.facts.append(f"{who} {pick(rng, GO)} the {room}.")

    def ask(self, person: str) -> Asked:
        return f"Where is {person}? ", self.room[person], self.latest[person]


def timed_story(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The five questions of a story of qa14: everyone moves on from yesterday to this evening, told out of order.

    Between two questions lie two statements; before the first as many pairs as it takes until somebody moved twice.
    """
    facts: list[str] = []
    rooms: dict[str, list[str]] = {person: [] for person in words.people}  # by time
    line: dict[tuple[str, int], int] = {}  # (person, time) -> statement
    moves: list[tuple[str, int]] = []  # as they happened
    while True:
        block: list[tuple[str, int]] = []
        while not block or max(map(len, rooms.values())) < 2:
            for _ in range(2):
                person = pick(rng, [person for person, told in rooms.items() if len(told) < len(TIMES)])
                rooms[person].append(pick(rng, [room for room in words.rooms if room not in rooms[person][-1:]]))
                block.append((person, len(rooms[person]) - 1))
        moves += block
        for i in range(len(block) - 1, 0, -1):  # a cyclic shuffle, as in the files: two always change places
            j = rng.randrange(i)
            block[i], block[j] = block[j], block[i]
        for person, time in block:
            line[person, time] = len(facts)
            when, move = TIMES[time], f"{person} {pick(rng, GO)} the {rooms[person][time]}"
            facts.append(f"{when.capitalize()} {move}." if rng.random() < 0.5 else f"{move} {when}.")
        person, time = pick(rng, [(person, time) for person, time in moves[-WINDOW:] if time > 0])
        room = rooms[person][time]
        time = max(time for time, told in enumerate(rooms[person]) if told == room)
        support = (line[person, time], line[person, time - 1])
        yield BabiSample(tuple(facts), f"Where was {person} before the {room}? ", rooms[person][time - 1], support)
