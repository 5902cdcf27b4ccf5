"""What a perfect reader of a bAbI story would have written down after each of its sentences, whatever is asked in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lrmt.tasks.babi.solve import Told, parse
from lrmt.tasks.babi.vocabulary import TIMES, Vocabulary, words_of_files

_TRAIL = 5  #: of a thing's way, and of gifts, so many of the last are kept
_NOWHERE = "nowhere"  #: where those are of whom nothing was told yet

# those who are somewhere, in tasks that ask where
_CAST = dict.fromkeys(("qa1", "qa6", "qa9", "qa10", "qa11", "qa12", "qa13"), ("people",))
_CAST |= dict.fromkeys(("qa2", "qa3", "qa7", "qa8"), ("people", "objects"))
# which slots of which sentences name them
_SLOTS = {
    "people": dict.fromkeys(("go", "get", "drop", "be", "not", "either"), ("person",))
    | {"both": ("person", "other"), "give": ("person", "receiver")},
    "objects": dict.fromkeys(("get", "drop", "give"), ("thing",)),
    "rooms": dict.fromkeys(("go", "be", "not", "both", "then"), ("thing",)) | {"either": ("thing", "other")},
}


def take_notes(facts: Sequence[str], task: str, cast: Iterable[str] = ()) -> list[str]:
    """The state of the world after each fact. Those of the `cast` are in it from the start: a memory is written at once, not word after
    word, and looks up where one person is more easily than who was told as the third.

    Where a story has no such state, relations and gifts, it is what was told, without its small words, in that order: what stands in a
    memory already stays where it is. Raises ValueError for a sentence outside the task's grammar.
    """
    told = [parse(fact, task) for fact in facts]
    if None in told:
        raise ValueError(f"not a story of {task}: {facts!r}")
    return list({"qa3": _ways, "qa5": _gifts, "qa14": _days}.get(task, _whereabouts)(told, cast))


def first_note(cast: Iterable[str]) -> str:
    """The state of the world before anything is told."""
    return _join(dict.fromkeys(cast, _NOWHERE))


def find_cast(
    task: str, vocabulary: Vocabulary | None = None, stories: Iterable[Sequence[str]] = ()
) -> tuple[list[str], list[str]]:
    """People of a task, and things where it asks for them, and the rooms where they can be: those of the vocabulary, or of the
    facts of `stories` where these name others. None where a task does not ask who is where, or stories are not of its grammar.
    """
    if task not in _CAST or None in (told := [parse(fact, task) for facts in stories for fact in facts]):
        return [], []
    words = vocabulary.of(task) if vocabulary else words_of_files(task)
    names = {kind: list(getattr(words, kind)) for kind in ("people", "objects", "rooms")}
    for kind, slots in _SLOTS.items():
        named = {fact[slot] for fact in told for slot in slots.get(fact["is"], ())}
        if not named <= {*names[kind]}:
            names[kind] = sorted(named)
    return [name for kind in _CAST[task] for name in names[kind]], names["rooms"]


def _join(state: dict[str, str]) -> str:
    return " ".join(f"{subject} {is_}" for subject, is_ in state.items())


# --- each yields what is known after one sentence more ------------------------------------------------------------------


def _whereabouts(told: Told, cast: Iterable[str]) -> Iterator[str]:
    """Where people and things are, who holds what, and what kind they are; relations as they were told."""
    state = dict.fromkeys(cast, _NOWHERE)
    traits: dict[str, str] = {}
    relations: list[str] = []
    people: list[str] = []  # whom "they" and "she" mean
    for fact in told:
        kind, person, thing, other = (fact.get(slot) for slot in ("is", "person", "thing", "other"))
        if kind in ("relation", "bigger", "fits", "fear"):
            way = {"bigger": "bigger", "fits": "bigger", "fear": "fear"}.get(kind, fact.get("way"))
            relations.append(f"{thing} {way} {other}")
        elif kind in ("kind", "state"):
            traits[person] = " ".join([*filter(None, [traits.pop(person, None)]), thing])
        elif kind in ("get", "give"):
            state[thing] = fact.get("receiver", person)
        elif kind == "drop":
            state[thing] = state.get(person, _NOWHERE)
        else:
            if kind != "then":
                people = [person, other] if kind == "both" else [person]
            where = {"not": f"not {thing}", "either": f"{thing} or {other}"}.get(kind, thing)
            state |= dict.fromkeys(people, where)
        known = {
            subject: f"{trait} {state[subject]}" if subject in state else trait for subject, trait in traits.items()
        }
        yield " ".join([*relations, *filter(None, [_join(known | {s: w for s, w in state.items() if s not in known})])])


def _ways(told: Told, cast: Iterable[str]) -> Iterator[str]:
    """Where people are, who holds what, and the last rooms of each thing."""
    state = dict.fromkeys(cast, _NOWHERE)
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    ways: dict[str, list[str]] = {}
    for fact in told:
        kind, person, thing = fact["is"], fact["person"], fact["thing"]
        if kind == "go":
            at[person] = thing
            for held in (h for h, by in holder.items() if by == person):
                ways[held].append(thing)
        elif kind == "get":
            holder[thing] = person
            way = ways.setdefault(thing, [])
            if person in at and way[-1:] != [at[person]]:
                way.append(at[person])
        else:
            holder.pop(thing, None)
        things = {t: " ".join([*way[-_TRAIL:], *filter(None, [holder.get(t)])]) or _NOWHERE for t, way in ways.items()}
        yield _join(state | at | things)


def _gifts(told: Told, _) -> Iterator[str]:
    """Who gave what to whom: the last gifts, in order."""
    given: list[str] = []
    for fact in told:
        if fact["is"] == "give":
            given.append(f"{fact['person']} {fact['thing']} {fact['receiver']}")
        yield " ".join(given[-_TRAIL:])


def _days(told: Told, _) -> Iterator[str]:
    """Where each person was, from yesterday to this evening."""
    days: dict[str, dict[int, str]] = {}
    for fact in told:
        time = TIMES.index((fact.get("first") or fact["last"]).lower())
        days.setdefault(fact["person"], {})[time] = fact["thing"]
        yield _join({person: " ".join(day[time] for time in sorted(day)) for person, day in days.items()})
