"""Things related to each other: two-argument relations, positions, sizes and paths (qa4, qa17-qa19)."""

import itertools
import random
from collections.abc import Iterator

from lrmt.tasks.babi.files import BabiSample
from lrmt.tasks.babi.vocabulary import COMPASS, SIDES, Words
from lrmt.tasks.babi.world import pick

_TRIES = 50  # draws for a question of qa18 before more is told


Graph = dict[str, dict[str, str]]  # graph[a][b] is the way such that "a is <way> of b"


def _opposite(way: str, ways: dict[str, tuple[int, int]]) -> str:
    x, y = ways[way]
    return next(other for other, step in ways.items() if step == (-x, -y))


def _relate(graph: Graph, a: str, b: str, way: str, ways: dict[str, tuple[int, int]]) -> None:
    graph.setdefault(a, {})[b] = way
    graph.setdefault(b, {})[a] = _opposite(way, ways)


def _draw(graph: Graph, rng: random.Random) -> tuple[str, str]:
    a = pick(rng, tuple(graph))
    return a, pick(rng, tuple(graph[a]))


def _draw_all(graph: Graph, rng: random.Random) -> list[tuple[str, str]]:
    """Every relation once, one way round: drawn until all are, so that things with few relations tend to come first."""
    drawn: dict[frozenset[str], tuple[str, str]] = {}
    while len(drawn) < sum(map(len, graph.values())) // 2:
        pair = _draw(graph, rng)
        drawn.setdefault(frozenset(pair), pair)
    return list(drawn.values())


def _line_of(pairs: list[tuple[str, str]], a: str, b: str) -> int:
    return next(i for i, pair in enumerate(pairs) if {*pair} == {a, b})


def beside(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The question of a story of qa4: three rooms in a line, told by two sentences."""
    first, middle, last = rng.sample(words.rooms, 3)
    graph: Graph = {}
    way = pick(rng, tuple(COMPASS))
    _relate(graph, first, middle, way, COMPASS)
    _relate(graph, middle, last, way, COMPASS)
    told = _draw_all(graph, rng)
    facts = tuple(f"The {a} is {graph[a][b]} of the {b}." for a, b in told)
    line = rng.randrange(2)
    answer, given = told[line]  # what a sentence says of a room is asked, never what it implies of the other
    ahead, behind = graph[answer][given], graph[given][answer]
    question = f"What is {ahead} of the {given}?" if rng.random() < 0.5 else f"What is the {given} {behind} of?"
    yield BabiSample(facts, question, answer, (line,))


def positions(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The eight questions of a story of qa17, about two shapes that a third one relates."""
    first, middle, last = rng.sample(words.shapes, 3)
    graph: Graph = {}
    ways = rng.sample(list(SIDES), 2)  # never the same: the ends do not lie in one place
    for end, way in zip((first, last), ways, strict=True):
        _relate(graph, end, middle, way, SIDES)
    told = _draw_all(graph, rng)
    facts = tuple(f"The {b} is {graph[b][a]} the {a}." for a, b in told)
    place = {end: SIDES[graph[end][middle]] for end in (first, last)}
    for _ in range(8):
        a, b = (first, last) if rng.random() < 0.5 else (last, first)
        apart = [place[a][axis] - place[b][axis] for axis in (0, 1)]
        true = [way for way, (x, y) in SIDES.items() if x * apart[0] + y * apart[1] > 0]
        yes = rng.random() < 0.5
        way = pick(rng, true if yes else [way for way in SIDES if way not in true])
        support = (_line_of(told, a, middle), _line_of(told, b, middle))
        yield BabiSample(facts, f"Is the {a} {way} the {b}?", "yes" if yes else "no", support)


def sizes(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The questions of a story of qa18: five statements, then five questions; five more where no question is found."""
    things = [*rng.sample(words.containers, len(words.containers)), *words.contents]
    pairs = list(itertools.combinations(things, 2))  # (bigger, smaller)
    told: list[tuple[str, str]] = []
    facts: list[str] = []
    while True:
        for _ in range(5):
            bigger, smaller = pick(rng, pairs)
            told.append((bigger, smaller))
            in_words = (f"The {bigger} is bigger than the {smaller}.", f"The {smaller} fits inside the {bigger}.")
            facts.append(pick(rng, in_words))
        for _ in range(5):
            asked = _ask_size(told, rng)
            if asked is None:
                break
            yield BabiSample(tuple(facts), *asked)
        else:
            return


def _ask_size(told: list[tuple[str, str]], rng: random.Random):
    """A question about the outer things of two statements: one drawn, and the first other that shares a thing."""
    for _ in range(_TRIES):
        line = rng.randrange(len(told))
        side = rng.randrange(2)
        shared = told[line][side]
        other = next((i for i, pair in enumerate(told) if i != line and shared in pair), None)
        if other is None or told[other][side] == shared:
            continue  # shared must be the smaller of one and the bigger of the other
        a, b = told[line][1 - side], told[other][side]
        question = f"Is the {a} bigger than the {b}?" if rng.random() < 0.5 else f"Does the {b} fit in the {a}?"
        return question, "yes" if side == 1 else "no", (line, other)
    return None


def paths(task: str, rng: random.Random, words: Words) -> Iterator[BabiSample]:
    """The question of a story of qa19: a way of two steps, and three rooms beside it."""
    start, middle, end, *others = rng.sample(words.rooms, 6)
    first, second = pick(rng, tuple(COMPASS)), pick(rng, tuple(COMPASS))
    while second == _opposite(first, COMPASS):
        second = pick(rng, tuple(COMPASS))
    graph: Graph = {}
    _relate(graph, middle, start, first, COMPASS)
    _relate(graph, end, middle, second, COMPASS)
    free = [
        (room, way) for room in graph for way in COMPASS if way not in [graph[other][room] for other in graph[room]]
    ]
    for other, (room, way) in zip(others, rng.sample(free, len(others)), strict=True):
        _relate(graph, other, room, way, COMPASS)  # two of them may lie in one place, as in the files
    told = _draw_all(graph, rng)
    facts = tuple(f"The {a} is {graph[a][b]} of the {b}." for a, b in told)
    support = (_line_of(told, start, middle), _line_of(told, middle, end))
    yield BabiSample(facts, f"How do you go from the {start} to the {end}?", f"{first[0]},{second[0]}", support)
