"""Unlimited stories of all twenty tasks, with the measured statistics of the v1.2 English files."""

import itertools
import random

from lrmt.errors import UsageError
from lrmt.tasks.babi import deduction, moves, relations, world
from lrmt.tasks.babi.files import BabiSample
from lrmt.tasks.babi.vocabulary import COMPASS, NUMBERS, Vocabulary, words_of_files

_STORIES = {  # task -> (what tells a story, the most questions of one)
    **{f"qa{n}": (world.story, 5) for n in (1, 2, 3)},
    "qa4": (relations.beside, 1),
    **{f"qa{n}": (world.story, 5) for n in (5, 6, 7, 8)},
    **{f"qa{n}": (moves.story, 5) for n in range(9, 14)},
    "qa14": (moves.timed_story, 5),
    "qa15": (deduction.fears, 4),
    "qa16": (deduction.colours, 1),
    "qa17": (relations.positions, 8),
    "qa18": (relations.sizes, 9),
    "qa19": (relations.paths, 1),
    "qa20": (deduction.motives, 12),
}
SIMULATED = tuple(_STORIES)


def simulate(task: str, num_stories: int, seed: int | str, vocabulary: Vocabulary | None = None) -> list[BabiSample]:
    """Simulate stories with all their questions, reproducible for a seed; words as in the files by default."""
    rng = random.Random(f"{task}/{seed}")
    return [sample for _ in range(num_stories) for sample in simulate_story(task, rng, vocabulary=vocabulary)]


def simulate_story(
    task: str, rng: random.Random, num_questions: int | None = None, vocabulary: Vocabulary | None = None
) -> list[BabiSample]:
    """Simulate one story up to its `num_questions`-th question, or to its end where that comes first.

    Raises UsageError for an unknown task and for a vocabulary with too few words for it.
    """
    if task not in _STORIES:
        raise UsageError(f"cannot simulate {task!r}; known: qa1..qa20")
    tell, most = _STORIES[task]
    words = vocabulary.of(task) if vocabulary else words_of_files(task)
    return list(itertools.islice(tell(task, rng, words), min(num_questions or most, most)))


def simulate_question(task: str, rng: random.Random, vocabulary: Vocabulary | None = None) -> BabiSample:
    """Simulate one question of one story: every question of every story is equally likely."""
    while True:
        number = rng.randint(1, _STORIES[task][1])
        story = simulate_story(task, rng, number, vocabulary)
        if len(story) == number:
            return story[-1]


def answers(task: str, vocabulary: Vocabulary | None = None) -> tuple[str, ...]:
    """Every answer that a task can have; of the lists of qa8 one order each."""
    words = vocabulary.of(task) if vocabulary else words_of_files(task)
    if task in ("qa6", "qa9", "qa17", "qa18"):
        return "yes", "no"
    if task == "qa10":
        return "yes", "no", "maybe"
    if task == "qa5":
        return *words.people, *words.objects
    if task == "qa7":
        return NUMBERS[: len(words.objects) + 1]
    if task == "qa8":
        sizes = range(1, len(words.objects) + 1)
        return "nothing", *(",".join(held) for n in sizes for held in itertools.combinations(words.objects, n))
    if task == "qa15":
        return tuple(words.species)
    if task == "qa16":
        return words.colours
    if task == "qa19":
        steps = itertools.product(COMPASS, repeat=2)
        return tuple(f"{a[0]},{b[0]}" for a, b in steps if a == b or abs(COMPASS[a][0]) != abs(COMPASS[b][0]))
    if task == "qa20":
        return *words.moods, *dict.fromkeys(room for room, _ in words.moods.values())
    return words.rooms
