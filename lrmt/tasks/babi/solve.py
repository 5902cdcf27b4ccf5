"""Answer a question from the text of its story alone: the test of the files and of the simulator."""

import functools
import re
from collections.abc import Sequence

from lrmt.tasks.babi.vocabulary import (
    COMPASS,
    DROP,
    GET,
    GIVE,
    GO,
    NUMBERS,
    SIDES,
    THEN,
    TIMES,
    Vocabulary,
    Words,
    words_of_files,
)

Solution = tuple[str, tuple[int, ...]]
Asked = dict[str, str]  # slot -> word
Told = list[dict[str, str]]  # a sentence: its kind under "is", and what stands in its slots

_WHEREABOUTS = ("go", "be", "not", "either")  # sentences that tell where a person is
_PARTS = {
    "NAME": [r"[\w-]+"],
    "THING": [r"[\w-]+(?: [\w-]+)*?"],  # one or more words, as few as possible
    "GO": GO,
    "GET": GET,
    "DROP": DROP,
    "GIVE": GIVE,
    "THEN": THEN,
    "TIME": [word for time in TIMES for word in (time, time.capitalize())],
    "WAY": [*COMPASS, *SIDES],
}


@functools.cache
def _compiled(sentence: str) -> re.Pattern:
    """`<role:PART>` is a slot, `<PART>` a part that nobody asks about."""

    def expand(slot: re.Match) -> str:
        name = f"?P<{slot[1]}>" if slot[1] else "?:"
        return f"({name}{'|'.join(_PARTS[slot[2]])})"

    return re.compile(re.sub(r"<(?:(\w+):)?([A-Z]+)>", expand, sentence))


_FACTS = {
    "go": r"<person:NAME> <GO> the <thing:THING>\.",
    "get": r"<person:NAME> <GET> the <thing:THING>(?: there)?\.",
    "drop": r"<person:NAME> <DROP> the <thing:THING>(?: there)?\.",
    "give": r"<person:NAME> <GIVE> the <thing:THING> to <receiver:NAME>\.",
    "be": r"<person:NAME> is in the <thing:THING>\.",
    "not": r"<person:NAME> is (?:not|no longer) in the <thing:THING>\.",
    "either": r"<person:NAME> is either in the <thing:THING> or the <other:THING>\.",
    "both": r"<person:NAME> and <other:NAME> <GO> the <thing:THING>\.",
    "then": r"<THEN> (?:he|she|they) <GO> the <thing:THING>\.",
    "when": r"(?:<first:TIME> )?<person:NAME> <GO> the <thing:THING>(?: <last:TIME>)?\.",
    "relation": r"The <thing:THING> is <way:WAY>(?: of)? the <other:THING>\.",  # thing is way of other
    "bigger": r"The <thing:THING> is bigger than the <other:THING>\.",
    "fits": r"The <other:THING> fits inside the <thing:THING>\.",
    "fear": r"<thing:NAME> are afraid of <other:NAME>\.",
    "kind": r"<person:NAME> is an? <thing:NAME>\.",
    "state": r"<person:NAME> is <thing:THING>\.",
}


def solve(facts: Sequence[str], question: str, task: str, vocabulary: Vocabulary | None = None) -> Solution:
    """Answer a question from the text alone: (answer, support as indices into `facts`).

    The vocabulary matters only for what no story tells: the plurals of qa15, and where the moods of qa20 lead. Where
    several pairs of statements of qa18 support an answer, the one that begins latest is given. Raises ValueError for a
    sentence outside the task's grammar and for a question that the story does not answer.
    """
    _, questions = _TASKS[task]
    told = [parse(fact, task) for fact in facts]
    if None in told:
        raise ValueError(f"not a story of {task}: {facts!r}")
    for pattern, answer in questions.items():
        asked = _compiled(pattern).fullmatch(question.strip())
        if asked:
            words = vocabulary.of(task) if vocabulary else words_of_files(task)
            solution = answer(told, asked.groupdict(), words)
            if solution is None:
                raise ValueError(f"the story does not answer {question!r}: {facts!r}")
            return solution
    raise ValueError(f"not a question of {task}: {question!r}")


def parse(fact: str, task: str) -> dict[str, str] | None:
    """A sentence of a task: its kind under "is", and what stands in its slots; None outside the task's grammar."""
    return _parse(fact.strip(), _TASKS[task][0])


@functools.lru_cache(maxsize=100_000)
def _parse(fact: str, kinds: str) -> dict[str, str] | None:
    for kind in kinds.split():
        match = _compiled(_FACTS[kind]).fullmatch(fact)
        if match:
            return {"is": kind, **{role: thing for role, thing in match.groupdict().items() if thing}}
    return None


def _latest(told: Told, **slots: str) -> int | None:
    """The last sentence with these slots."""
    return next((i for i in reversed(range(len(told))) if slots.items() <= told[i].items()), None)


def _latest_of(told: Told, kind: str, person: str) -> int | None:
    """The last sentence of a kind about a person, whose name may be in lower case."""
    about = (i for i, fact in enumerate(told) if fact["is"] == kind and fact["person"].lower() == person.lower())
    return max(about, default=None)


# --- each function answers (story, question, vocabulary), None when the story does not tell ---------------------------


def _where_is_person(told, asked, words):
    people: set[str] = set()
    found = None
    for i, fact in enumerate(told):
        if fact["is"] != "then":
            people = {fact["person"], fact.get("other")}
        if asked["person"] in people:
            found = (i - 1, i) if fact["is"] == "then" else (i,)
    return found and (told[found[-1]]["thing"], found)


def _is_person_in(told, asked, words):
    told = [fact if fact["is"] in _WHEREABOUTS else {} for fact in told]
    last = _latest(told, person=asked["person"])
    if last is None:
        return None
    kind, here = told[last]["is"], asked["thing"] in (told[last]["thing"], told[last].get("other"))
    if kind == "not":
        return None if not here else ("no", (last,))
    return ("maybe" if kind == "either" else "yes") if here else "no", (last,)


def _moves(told, person, start, stop):
    return [i for i in range(start, stop) if told[i]["is"] == "go" and told[i]["person"] == person]


def _touches(told, thing):
    return [i for i, fact in enumerate(told) if fact["thing"] == thing and fact["is"] in ("get", "drop")]


def _where_is_thing(told, asked, words):
    touches = _touches(told, asked["thing"])
    if not touches:
        return None
    touch = touches[-1]
    span = (0, touch) if told[touch]["is"] == "drop" else (touch, len(told))
    moves = _moves(told, told[touch]["person"], *span)
    return (told[moves[-1]]["thing"], (touch, moves[-1])) if moves else None


def _where_was_thing(told, asked, words):
    touches = _touches(told, asked["thing"])
    gets = [i for i in touches if told[i]["is"] == "get"]
    if not gets:
        return None
    touch = touches[-1]
    stop = touch if told[touch]["is"] == "drop" else len(told)
    moves = _moves(told, told[touch]["person"], gets[-1], stop)
    for before, move in reversed(list(zip(moves[:-1], moves[1:], strict=True))):
        if told[move]["thing"] == asked["room"]:
            return told[before]["thing"], (touch, move, before)
    return None


def _gift(wanted: str):
    def answer(told: Told, asked: Asked, words: Words) -> Solution | None:
        last = _latest(told, **{"is": "give"}, **asked)
        return None if last is None else (told[last][wanted], (last,))

    return answer


def _belongings(told, person):
    """Object -> lines in which the person got or lost it, in the order of first touch; and what is held now."""
    lines: dict[str, list[int]] = {}
    held: dict[str, None] = {}
    for i, fact in enumerate(told):
        if fact["is"] == "go" or person not in (fact["person"], fact.get("receiver")):
            continue
        lines.setdefault(fact["thing"], []).append(i)
        gains = fact["is"] == "get" or fact.get("receiver") == person
        held.update({fact["thing"]: None}) if gains else held.pop(fact["thing"], None)
    return lines, held


def _how_many(told, asked, words):
    lines, held = _belongings(told, asked["person"])
    return (NUMBERS[len(held)], tuple(sorted(sum(lines.values(), [])))) if lines else None


def _what_is_carried(told, asked, words):
    lines, held = _belongings(told, asked["person"])
    answer = ",".join(thing for thing in lines if thing in held) or "nothing"
    return (answer, tuple(sum(lines.values(), []))) if lines else None


def _where_was_person(told, asked, words):
    when: dict[int, int] = {}  # time -> statement
    for i, fact in enumerate(told):
        if fact["person"] == asked["person"]:
            when[TIMES.index((fact.get("first") or fact["last"]).lower())] = i
    for time in reversed(range(1, len(TIMES))):
        if {time - 1, time} <= when.keys() and told[when[time]]["thing"] == asked["room"]:
            return told[when[time - 1]]["thing"], (when[time], when[time - 1])
    return None


def _step(fact: dict[str, str], start: str, end: str) -> tuple[int, int] | None:
    """How to go from one thing of a relation to the other; None where it does not relate the two."""
    x, y = (COMPASS | SIDES)[fact["way"]]
    return {(fact["other"], fact["thing"]): (x, y), (fact["thing"], fact["other"]): (-x, -y)}.get((start, end))


def _beside(told, asked, words):
    """`answer` is `way` of `given`, or `given` is `way` of it."""
    step = (COMPASS | SIDES)[asked["way"]]
    for i, fact in enumerate(told):
        for near, far in ((fact["thing"], fact["other"]), (fact["other"], fact["thing"])):
            if asked.get("ahead_of") == far and _step(fact, far, near) == step:
                return near, (i,)
            if asked.get("behind") == near and _step(fact, far, near) == step:
                return far, (i,)
    return None


def _two_steps(told, start, end):
    """Statements i and j, and their steps, that lead from one thing to another over a third."""
    for i, first in enumerate(told):
        for j, second in enumerate(told):
            for middle in {first["thing"], first["other"]} & {second["thing"], second["other"]}:
                steps = _step(first, start, middle), _step(second, middle, end)
                if i != j and None not in steps:
                    return (i, j), steps
    return None


def _is_positioned(told, asked, words):
    found = _two_steps(told, asked["other"], asked["thing"])
    if found is None:
        return None
    (j, i), (a, b) = found
    x, y = SIDES[asked["way"]]
    return "yes" if x * (a[0] + b[0]) + y * (a[1] + b[1]) > 0 else "no", (i, j)


def _way(told, asked, words):
    found = _two_steps(told, asked["start"], asked["end"])
    if found is None:
        return None
    letters = {step: way[0] for way, step in COMPASS.items()}
    return ",".join(letters[step] for step in found[1]), found[0]


def _is_bigger(told, asked, words):
    """Two statements over a shared thing: the latest that names `start`, and the first other that names the shared."""
    start, end = asked["start"], asked["end"]
    pairs = [(fact["thing"], fact["other"]) for fact in told]  # (bigger, smaller)
    for i in reversed(range(len(pairs))):
        if start in pairs[i]:
            side = 1 - pairs[i].index(start)
            shared = pairs[i][side]
            j = next((j for j, pair in enumerate(pairs) if j != i and shared in pair), None)
            if j is not None and pairs[j] == ((shared, end) if side == 1 else (end, shared)):
                return "yes" if side == 1 else "no", (i, j)
    return None


def _what_is_feared(told, asked, words):
    kind = _latest_of(told, "kind", asked["person"])
    if kind is None:
        return None
    plural = words.species[told[kind]["thing"]]
    fear = next((i for i, fact in enumerate(told) if fact["is"] == "fear" and fact["thing"].lower() == plural), None)
    if fear is None:
        return None
    singular = {plural: singular for singular, plural in words.species.items()}
    return singular[told[fear]["other"]], (kind, fear)


def _colour(told, asked, words):
    """The colour of the last one told to be of the same species."""
    own = _latest_of(told, "kind", asked["person"])
    mates = [i for i, fact in enumerate(told) if own not in (None, i) and fact["thing"] == told[own]["thing"]]
    colour = _latest_of(told, "state", told[mates[-1]]["person"]) if mates else None
    return None if colour is None else (told[colour]["thing"], (own, mates[-1], colour))


def _goal(told, asked, words):
    mood = _latest_of(told, "state", asked["person"])
    return None if mood is None else (words.moods[told[mood]["thing"]][0], (mood,))


def _reason(told, asked, words):
    mood = _latest_of(told, "state", asked["person"])
    if mood is None or asked["goal"] not in words.moods[told[mood]["thing"]]:
        return None
    return told[mood]["thing"], (mood,)


_WHERE_IS = {r"Where is <person:NAME>\?": _where_is_person}
_IS_IN = {r"Is <person:NAME> in the <thing:THING>\?": _is_person_in}
_TASKS = {  # task -> (kinds of its sentences, what answers each of its questions)
    "qa1": ("go", _WHERE_IS),
    "qa2": ("go get drop", {r"Where is the <thing:THING>\?": _where_is_thing}),
    "qa3": ("go get drop", {r"Where was the <thing:THING> before the <room:THING>\?": _where_was_thing}),
    "qa4": (
        "relation",
        {
            r"What is <way:WAY> of the <ahead_of:THING>\?": _beside,
            r"What is the <behind:THING> <way:WAY> of\?": _beside,
        },
    ),
    "qa5": (
        "go get drop give",
        {
            r"What did <person:NAME> give to <receiver:NAME>\?": _gift("thing"),
            r"Who gave the <thing:THING> to <receiver:NAME>\?": _gift("person"),
            r"Who gave the <thing:THING>\?": _gift("person"),
            r"Who received the <thing:THING>\?": _gift("receiver"),
            r"Who did <person:NAME> give the <thing:THING> to\?": _gift("receiver"),
        },
    ),
    "qa6": ("go get drop", _IS_IN),
    "qa7": ("go get drop give", {r"How many objects is <person:NAME> carrying\?": _how_many}),
    "qa8": ("go get drop", {r"What is <person:NAME> carrying\?": _what_is_carried}),
    "qa9": ("go be not", _IS_IN),
    "qa10": ("go be either", _IS_IN),
    "qa11": ("go then", _WHERE_IS),
    "qa12": ("both", _WHERE_IS),
    "qa13": ("both then", _WHERE_IS),
    "qa14": ("when", {r"Where was <person:NAME> before the <room:THING>\?": _where_was_person}),
    "qa15": ("fear kind", {r"What is <person:NAME> afraid of\?": _what_is_feared}),
    "qa16": ("kind state", {r"What color is <person:NAME>\?": _colour}),
    "qa17": ("relation", {r"Is the <thing:THING> <way:WAY> the <other:THING>\?": _is_positioned}),
    "qa18": (
        "bigger fits",
        {
            r"Is the <start:THING> bigger than the <end:THING>\?": _is_bigger,
            r"Does the <end:THING> fit in the <start:THING>\?": _is_bigger,
        },
    ),
    "qa19": ("relation", {r"How do you go from the <start:THING> to the <end:THING>\?": _way}),
    "qa20": (
        "state go get",
        {
            r"Where will <person:NAME> go\?": _goal,
            r"Why did <person:NAME> (?:go to|get) the <goal:THING>\?": _reason,
        },
    ),
}
