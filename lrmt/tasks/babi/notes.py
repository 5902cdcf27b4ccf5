"""What a perfect reader of a bAbI story would have written down after each of its sentences, whatever is asked in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lrmt.tasks.babi.solve import Told, parse
from lrmt.tasks.babi.vocabulary import TIMES, Vocabulary, words_of_files

_GIFTS = 5  #: so many of the last are kept
_NOWHERE = "nowhere"  #: where those are of whom nothing was told yet
_NO_WAY = " ".join([_NOWHERE] * 5)  #: of a thing in tasks that ask for its way: who has it, and its last four rooms

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


def take_notes(facts: Sequence[str], task: str, cast: Mapping[str, str] | None = None) -> list[str]:
    """The state of the world after each fact. Those of the `cast` are in it from the start, and what is said of each takes as many words
    as before anything is told: a memory is written at once, not word after word, and looks up where one person is more easily than who
    was told as the third.

    Where a story has no such state, relations and gifts, it is what was told, without its small words, in that order: what stands in a
    memory already stays where it is. Raises ValueError for a sentence outside the task's grammar.
    """
    told = [parse(fact, task) for fact in facts]
    if None in told:
        raise ValueError(f"not a story of {task}: {facts!r}")
    if task in ("qa5", "qa14"):
        return list(_gifts(told) if task == "qa5" else _days(told))
    return list(_whereabouts(told, cast or {}, _NO_WAY if task == "qa3" else _NOWHERE))


def first_note(cast: Mapping[str, str]) -> str:
    """The state of the world before anything is told."""
    return _join(cast)


def find_cast(
    task: str, vocabulary: Vocabulary | None = None, stories: Iterable[Sequence[str]] = ()
) -> tuple[dict[str, str], list[str]]:
    """People of a task, and things where it asks for them, with what is noted of each before anything is told, and the rooms where they
    can be: those of the vocabulary, or of the facts of `stories` where these name others. None where a task does not ask who is where,
    or stories are not of its grammar.
    """
    if task not in _CAST or None in (told := [parse(fact, task) for facts in stories for fact in facts]):
        return {}, []
    words = vocabulary.of(task) if vocabulary else words_of_files(task)
    names = {kind: list(getattr(words, kind)) for kind in ("people", "objects", "rooms")}
    for kind, slots in _SLOTS.items():
        named = {fact[slot] for fact in told for slot in slots.get(fact["is"], ())}
        if not named <= {*names[kind]}:
            names[kind] = sorted(named)
    empty = {"people": _NOWHERE, "objects": _NO_WAY if task == "qa3" else _NOWHERE}
    return {name: empty[kind] for kind in _CAST[task] for name in names[kind]}, names["rooms"]


def _join(state: Mapping[str, str]) -> str:
    return " ".join(f"{subject} {is_}" for subject, is_ in state.items())


# --- each yields what is known after one sentence more ------------------------------------------------------------------


def _whereabouts(told: Told, cast: Mapping[str, str], no_thing: str) -> Iterator[str]:
    """Where people and things are, who holds what, and what kind they are; relations as they were told.

    A thing is with whoever has it or else where it is; of one for which there is room, who has it and its last rooms, the latest first.
    """
    state = dict(cast)
    holders: dict[str, str] = {}
    ways: dict[str, list[str]] = {}
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
        elif kind in ("get", "give", "drop"):
            holders[thing] = fact.get("receiver", person)
        else:
            if kind != "then":
                people = [person, other] if kind == "both" else [person]
            where = {"not": f"not {thing}", "either": f"{thing} or {other}"}.get(kind, thing)
            state |= dict.fromkeys(people, where)
        for held, holder in holders.items():
            way, room = ways.setdefault(held, []), state.get(holder, _NOWHERE)
            if room not in (_NOWHERE, *way[:1]):
                way.insert(0, room)
        if kind == "drop":
            del holders[thing]
        for moved, way in ways.items():
            words = len(cast.get(moved, no_thing).split())
            holder, rooms = holders.get(moved), [*way, *[_NOWHERE] * words]
            state[moved] = " ".join([holder or _NOWHERE, *rooms[: words - 1]]) if words > 1 else holder or rooms[0]
        known = {
            subject: f"{trait} {state[subject]}" if subject in state else trait for subject, trait in traits.items()
        }
        yield " ".join([*relations, *filter(None, [_join(known | {s: w for s, w in state.items() if s not in known})])])


def _gifts(told: Told) -> Iterator[str]:
    """Who gave what to whom: the last gifts, in order."""
    given: list[str] = []
    for fact in told:
        if fact["is"] == "give":
            given.append(f"{fact['person']} {fact['thing']} {fact['receiver']}")
        yield " ".join(given[-_GIFTS:])


def _days(told: Told) -> Iterator[str]:
    """Where each person was, from yesterday to this evening."""
    days: dict[str, dict[int, str]] = {}
    for fact in told:
        time = TIMES.index((fact.get("first") or fact["last"]).lower())
        days.setdefault(fact["person"], {})[time] = fact["thing"]
        yield _join({person: " ".join(day[time] for time in sorted(day)) for person, day in days.items()})
