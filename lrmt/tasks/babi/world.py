"""The moving world of qa1-qa3 and qa5-qa8: who is where and holds what."""

import random
from collections.abc import Iterator, Sequence

from lrmt.tasks.babi.files import BabiSample
from lrmt.tasks.babi.vocabulary import DROP, GET, GIVE, GO, NUMBERS, Words

WINDOW = 5  # a question is about one of the last five events
_DROP_THERE = 0.2
_GET_THERE = {"qa3": 0.2}  # always in the other tasks
# fitted to the shares of the files: the weight of giving relative to the other actions, and what it is right after
# another gift, when only the receiver gives, that very object, and seldom to a third person
_GIVE_WEIGHT = {"qa5": 3.6, "qa7": 3.9}
_GIVE_ON = 4.1
_GIVE_THIRD = 1 / 6

Asked = tuple[str, str, tuple[int, ...]]  # question, answer, support


def pick(rng: random.Random, options: Sequence):
    return options[int(rng.random() * len(options))]


def ask_in_window(world, rng: random.Random) -> Iterator[BabiSample]:
    """Endless questions: statements come in pairs; after each pair the events of the window are tried in random
    order, and the first that allows a question is asked about.

    `world` has `tell()`, `facts`, `events` and `ask(*event)`, which returns what is asked or None.
    """
    while True:
        world.tell()
        world.tell()
        window = world.events[-WINDOW:]
        rng.shuffle(window)
        for event in window:
            asked = world.ask(*event)
            if asked:
                yield BabiSample(tuple(world.facts), *asked)
                break


def story(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """Endless questions of one story of qa1-qa3 or qa5-qa8."""
    return ask_in_window(_World(task, rng, words), rng)


class _World:
    """Who is where and holds what; where everyone starts is never told."""

    def __init__(self, task: str, rng: random.Random, words: Words):
        self.rng, self.random = rng, rng.random
        self.people, self.rooms = tuple(words.people), words.rooms
        self.actions = {"qa1": (self._move,)}.get(task, (self._move, self._get, self._drop))
        self.give_weight = _GIVE_WEIGHT.get(task, 1.0)
        if task in _GIVE_WEIGHT:
            self.actions += (self._give,)
        self.ask = getattr(self, f"_ask_{task}")
        self.get_there = _GET_THERE.get(task, 1.0)
        self.facts: list[str] = []
        self.events: list[tuple[str, str, str | None]] = []  # (kind, person, object, None for a move)
        self.room = {person: self._pick(self.rooms) for person in self.people}
        self.place = {thing: self._pick(self.rooms) for thing in words.objects}  # a room, or the person who holds it
        self.room_told: list[str | None] = []  # room named by each statement, None for what is not a move
        self.last_move: dict[str, list[int]] = {person: [] for person in self.people}  # at most one statement each
        self.last_touch: dict[str, int] = {}  # object -> its last get or drop
        self.origin: dict[str, list[int]] = {}  # dropped object -> the dropper's last move before, if any
        self.carried: dict[str, list[int]] = {}  # object -> moves of its last carrier while he carried it
        self.last_gift: dict[str, tuple[int, str, str]] = {}  # object -> (statement, giver, receiver)
        self.lines: dict[str, dict[str, list[int]]] = {person: {} for person in self.people}  # statements by object

    def _pick(self, options: Sequence[str]) -> str:
        return options[int(self.random() * len(options))]

    def tell(self) -> None:
        """Append one statement; whatever is impossible is drawn again from the person on."""
        weight = _GIVE_ON if self._gift_before() else self.give_weight
        while True:
            person = self._pick(self.people)
            # each action has weight 1, but the last of them, which is to give, its own
            action = min(int(self.random() * (len(self.actions) - 1 + weight)), len(self.actions) - 1)
            if self.actions[action](person):
                return

    def _append(self, kind: str, person: str, thing: str | None, room: str | None, text: str) -> bool:
        if thing is not None:
            self.lines[person].setdefault(thing, []).append(len(self.facts))
        self.events.append((kind, person, thing))
        self.room_told.append(room)
        self.facts.append(text)
        return True

    def _held(self, person: str) -> list[str]:
        return [thing for thing, place in self.place.items() if place == person]

    def _move(self, person: str) -> bool:
        room = self._pick(self.rooms)
        if room == self.room[person]:
            return False
        self.room[person] = room
        self.last_move[person] = [len(self.facts)]
        for thing in self._held(person):
            self.carried[thing].append(len(self.facts))
        return self._append("move", person, None, room, f"{person} {self._pick(GO)} the {room}.")

    def _get(self, person: str) -> bool:
        here = [thing for thing, place in self.place.items() if place == self.room[person]]
        if not here:
            return False
        thing = self._pick(here)
        self.place[thing], self.carried[thing], self.last_touch[thing] = person, [], len(self.facts)
        there = " there" if self.random() < self.get_there else ""
        return self._append("get", person, thing, None, f"{person} {self._pick(GET)} the {thing}{there}.")

    def _drop(self, person: str) -> bool:
        held = self._held(person)
        if not held:
            return False
        thing = self._pick(held)
        self.place[thing], self.origin[thing] = self.room[person], self.last_move[person]
        self.last_touch[thing] = len(self.facts)
        there = " there" if self.random() < _DROP_THERE else ""
        return self._append("drop", person, thing, None, f"{person} {self._pick(DROP)} the {thing}{there}.")

    def _gift_before(self) -> str | None:
        """The object that the last statement gave away, if it did."""
        return self.events[-1][2] if self.events and self.events[-1][0] == "give" else None

    def _give(self, person: str) -> bool:
        held = self._held(person)
        others = [other for other in self.people if other != person and self.room[other] == self.room[person]]
        if not held or not others:
            return False
        before = self._gift_before()
        if before is None:
            thing, receiver = self._pick(held), self._pick(others)
        elif before in held:
            thing, receiver, giver = before, self._pick(others), self.last_gift[before][1]
            if receiver != giver and self.random() > _GIVE_THIRD:
                receiver = giver
        else:
            return False
        self.place[thing], self.carried[thing] = receiver, []
        self.last_gift[thing] = (len(self.facts), person, receiver)
        self.lines[receiver].setdefault(thing, []).append(len(self.facts))
        return self._append("give", person, thing, None, f"{person} {self._pick(GIVE)} the {thing} to {receiver}.")

    # Each returns (question, answer, support), or None when the event allows no question.

    def _ask_qa1(self, kind: str, person: str, thing: str | None) -> Asked | None:
        return f"Where is {person}? ", self.room[person], tuple(self.last_move[person])

    def _ask_qa2(self, kind: str, person: str, thing: str | None) -> Asked | None:
        if thing is None:
            return None
        held = self.place[thing] in self.room
        told = self.carried[thing][-1:] if held else self.origin[thing]
        if not told:
            return None
        return f"Where is the {thing}? ", self.room_told[told[0]], (self.last_touch[thing], told[0])

    def _ask_qa3(self, kind: str, person: str, thing: str | None) -> Asked | None:
        if thing is None or len(self.carried[thing]) < 2:
            return None
        moves = self.carried[thing]
        room = self.room_told[moves[1 + int(self.random() * (len(moves) - 1))]]
        last = max(j for j, move in enumerate(moves) if self.room_told[move] == room)
        answer = self.room_told[moves[last - 1]]
        support = (self.last_touch[thing], moves[last], moves[last - 1])
        return f"Where was the {thing} before the {room}? ", answer, support

    def _ask_qa5(self, kind: str, person: str, thing: str | None) -> Asked | None:
        if kind != "give":
            return None
        line, giver, receiver = self.last_gift[thing]
        what = (f"What did {giver} give to {receiver}? ", thing)
        forms = (
            what,
            what,  # as often as two others together
            (f"Who gave the {thing}? ", giver),
            (f"Who gave the {thing} to {receiver}? ", giver),
            (f"Who received the {thing}? ", receiver),
            (f"Who did {giver} give the {thing} to? ", receiver),
        )
        return *self._pick(forms), (line,)

    def _ask_qa6(self, kind: str, person: str, thing: str | None) -> Asked | None:
        if kind != "move":
            return None
        here = self.room[person]
        yes = self.random() < 0.5
        room = here if yes else self._pick([room for room in self.rooms if room != here])
        return f"Is {person} in the {room}? ", "yes" if yes else "no", tuple(self.last_move[person])

    def _ask_qa7(self, kind: str, person: str, thing: str | None) -> Asked | None:
        if thing is None:
            return None
        support = tuple(sorted(sum(self.lines[person].values(), [])))
        return f"How many objects is {person} carrying? ", NUMBERS[len(self._held(person))], support

    def _ask_qa8(self, kind: str, person: str, thing: str | None) -> Asked | None:
        if thing is None:
            return None
        lines, held = self.lines[person], self._held(person)
        answer = ",".join(thing for thing in lines if thing in held) or "nothing"
        return f"What is {person} carrying? ", answer, tuple(sum(lines.values(), []))
