"""What follows from kinds and moods: basic deduction, induction and motives (qa15, qa16, qa20)."""

import random
from collections.abc import Iterator

from lrmt.tasks.babi.files import BabiSample
from lrmt.tasks.babi.vocabulary import GET, GO, Words
from lrmt.tasks.babi.world import pick


def article(noun: str) -> str:
    return "an" if noun[0].lower() in "aeiou" else "a"


def fears(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The four questions of a story of qa15: who is what, and what fears what."""
    people, species = rng.sample(list(words.people), 4), rng.sample(list(words.species), 4)
    facts: list[str] = []
    feared: dict[str, tuple[str, int]] = {}  # species -> (its enemy, statement)
    kind: dict[str, tuple[str, int]] = {}  # person -> (species, statement)
    while len(feared) + len(kind) < 8:  # whatever is told already, or of a species not yet told, is drawn again
        subject = pick(rng, [*people, *species])
        other = pick(rng, [name for name in species if name != subject])
        if subject in feared or subject in kind:
            continue
        if subject in species:
            feared[subject] = (other, len(facts))
            plural = words.species[subject]
            facts.append(f"{plural[0].upper()}{plural[1:]} are afraid of {words.species[other]}.")
        elif other in feared:
            kind[subject] = (other, len(facts))
            facts.append(f"{subject} is {article(other)} {other}.")
    for _ in range(4):
        person = pick(rng, people)
        species_of, line = kind[person]
        enemy, fear = feared[species_of]
        yield BabiSample(tuple(facts), f"What is {person.lower()} afraid of?", enemy, (line, fear))


def colours(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The question of a story of qa16: the colour of somebody is that of the last one told to be of his species.

    Whenever somebody's species is told, it takes a new colour, which all of it told later have.
    """
    while True:
        people = rng.sample(list(words.people), 5)
        facts: list[str] = []
        colour: dict[str, str] = {}  # species -> its colour now
        kind: dict[str, tuple[str, int]] = {}  # person -> (species, statement)
        told: dict[str, tuple[str, int]] = {}  # person -> (colour, statement)
        while len(kind) + len(told) < 9:
            person = pick(rng, [person for person in people if person not in told])
            if person not in kind:
                species = pick(rng, tuple(words.species))
                kind[person] = (species, len(facts))
                colour[species] = pick(rng, words.colours)
                facts.append(f"{person} is {article(species)} {species}.")
            else:
                told[person] = (colour[kind[person][0]], len(facts))
                facts.append(f"{person} is {told[person][0]}.")
        asked = next(person for person in people if person not in told)
        mates = [person for person in told if kind[person][0] == kind[asked][0]]
        if len(mates) not in (0, 2):  # the files have no story with two
            break
    mate = max(mates, key=lambda person: kind[person][1])
    answer, line = told[mate]
    yield BabiSample(tuple(facts), f"What color is {asked}?", answer, (kind[asked][1], kind[mate][1], line))


def motives(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The questions of a story of qa20, one after each statement: moods, and where they lead."""
    mood = {person: pick(rng, tuple(words.moods)) for person in rng.sample(list(words.people), 4)}
    facts: list[str] = []
    steps = dict.fromkeys(mood, 0)
    reason: dict[str, int] = {}  # person -> the statement of his mood
    taken: set[str] = set()
    while True:
        able = [p for p, step in steps.items() if step < 2 or step == 2 and words.moods[mood[p]][1] not in taken]
        if not able:
            return
        person = pick(rng, able)
        room, thing = words.moods[mood[person]]
        if steps[person] == 0:
            reason[person] = len(facts)
            facts.append(f"{person} is {mood[person]}.")
            question, answer = f"Where will {person.lower()} go?", room
        elif steps[person] == 1:
            facts.append(f"{person} {pick(rng, GO)} the {room}.")
            question, answer = f"Why did {person.lower()} go to the {room}?", mood[person]
        else:
            taken.add(thing)
            facts.append(f"{person} {pick(rng, GET)} the {thing} there.")
            question, answer = f"Why did {person.lower()} get the {thing}?", mood[person]
        steps[person] += 1
        yield BabiSample(tuple(facts), question, answer, (reason[person],))
