import pytest

from lrmt.tasks import babi


def disagreements(samples, task):
    """(sample, solution) wherever the solver's answer or support is another one."""
    solved = ((sample, babi.solve(sample.facts, sample.question, task)) for sample in samples)
    return [(sample, solution) for sample, solution in solved if solution != (sample.answer, sample.support)]


def check_explained(task, sample, solution):
    """A disagreement is one of the two kinds of ambiguity that the stories have."""
    answer, support = solution
    if task == "qa5":
        # two gifts between the same two people: the files ask about either, the solver takes the later
        giver, receiver = sample.question.split()[2], sample.question.strip(" ?").split()[-1]
        for line, thing in ((support[0], answer), (sample.support[0], sample.answer)):
            words = sample.facts[line].rstrip(".").split()
            assert (words[0], words[-1], words[-3]) == (giver, receiver, thing)
        assert sample.question.startswith("What did") and support[0] > sample.support[0]
    else:
        # several pairs of statements of qa18 support an answer
        assert task == "qa18" and answer == sample.answer
        for pair in (support, sample.support):
            assert len({*pair}) == 2 and chain_holds([sample.facts[i] for i in pair], sample)


def chain_holds(facts, sample):
    """Two statements such as "The A is bigger than the B." and "The C fits inside the B." relate what is asked."""
    sizes = []
    for fact in facts:
        first, bigger, second = fact.removeprefix("The ").removesuffix(".").partition(" is bigger than the ")
        if not bigger:
            second, _, first = fact.removeprefix("The ").removesuffix(".").partition(" fits inside the ")
        sizes.append((first, second))
    if "bigger" in sample.question:
        outer = sample.question.removeprefix("Is the ").removesuffix("?").split(" bigger than the ")
    else:
        outer = sample.question.removeprefix("Does the ").removesuffix("?").split(" fit in the ")[::-1]
    (a, b), (c, d) = sizes
    ends = (a, d) if b == c else (c, b) if d == a else None
    return ends == tuple(outer if sample.answer == "yes" else outer[::-1])


EXCEPTIONS = {"qa5": 20, "qa18": 446}  # of the questions of train and valid together; see check_explained


@pytest.mark.realdata
@pytest.mark.parametrize("task", babi.SIMULATED)
def test_solver_agrees_with_the_official_files(task, official):
    samples = official(task)
    assert len(samples) == (2000 if task == "qa3" else 10000)
    differing = disagreements(samples, task)
    assert len(differing) == EXCEPTIONS.get(task, 0)
    for sample, solution in differing:
        check_explained(task, sample, solution)


@pytest.mark.parametrize("task", babi.SIMULATED)
def test_solver_agrees_with_the_simulator(task, simulated):
    samples = simulated(task)[:5000]
    differing = disagreements(samples, task)
    assert len(differing) <= len(samples) * {"qa5": 0.006, "qa18": 0.1}.get(task, 0)
    for sample, solution in differing:
        check_explained(task, sample, solution)


def moves(*names_and_rooms):
    return [f"{name} went to the {room}." for name, room in (pair.split() for pair in names_and_rooms)]


CARRIED = [*moves("Mary office"), "Mary got the milk there.", "Mary left the milk.", *moves("Mary garden")]
AGAIN = ["Mary got the apple there.", "Mary took the milk there."]
HANDED = ["Bill got the milk there.", "Bill gave the milk to Mary.", "Mary passed the milk to Bill."]
LINE = ["The kitchen is west of the hallway.", "The office is east of the hallway."]
SWANS = ["Lily is a swan.", "Greg is a swan.", "Greg is white.", "Lily is green.", "Brian is a swan."]
CORNER = ["The red sphere is to the right of the box.", "The box is below the big star."]


@pytest.mark.parametrize(
    ("task", "facts", "question", "answer", "support"),
    [
        ("qa1", moves("Mary office", "John garden", "Mary garden"), "Where is Mary? ", "garden", (2,)),
        ("qa2", CARRIED, "Where is the milk? ", "office", (2, 0)),
        ("qa2", [*CARRIED[:2], *moves("John garden", "Mary kitchen")], "Where is the milk? ", "kitchen", (1, 3)),
        (
            "qa3",
            ["Mary took the milk.", *moves("Mary office", "Mary garden", "Mary hallway", "Mary garden")],
            "Where was the milk before the garden? ",
            "hallway",
            (0, 4, 3),
        ),
        ("qa4", LINE, "What is west of the hallway?", "kitchen", (0,)),
        ("qa4", LINE, "What is the hallway west of?", "office", (1,)),
        ("qa5", HANDED, "Who did Bill give the milk to? ", "Mary", (1,)),
        ("qa5", HANDED, "Who gave the milk? ", "Mary", (2,)),
        ("qa5", HANDED, "Who gave the milk to Mary? ", "Bill", (1,)),
        ("qa6", [*moves("Mary office"), "Mary got the milk there."], "Is Mary in the garden? ", "no", (0,)),
        ("qa7", HANDED, "How many objects is Bill carrying? ", "one", (0, 1, 2)),
        ("qa7", HANDED, "How many objects is Mary carrying? ", "none", (1, 2)),
        (
            "qa8",
            [*CARRIED, "Mary got the apple there.", "Mary took the milk there."],
            "What is Mary carrying? ",
            "milk,apple",
            (1, 2, 5, 4),
        ),
        ("qa9", [*moves("Mary office"), "Mary is not in the office."], "Is Mary in the office? ", "no", (1,)),
        ("qa10", ["Bill is either in the park or the office."], "Is Bill in the office? ", "maybe", (0,)),
        ("qa11", [*moves("Mary office"), "Then she went to the garden."], "Where is Mary? ", "garden", (0, 1)),
        (
            "qa13",
            ["Mary and John went to the office.", "Then they went to the garden.", "John and Bill went to the park."],
            "Where is Mary? ",
            "garden",
            (0, 1),
        ),
        (
            "qa14",
            ["Mary went to the park this morning.", "Yesterday Mary went to the school."],
            "Where was Mary before the park? ",
            "school",
            (0, 1),
        ),
        ("qa15", ["Sheep are afraid of mice.", "Emily is a sheep."], "What is emily afraid of?", "mouse", (1, 0)),
        ("qa16", SWANS, "What color is Brian?", "white", (4, 1, 2)),
        ("qa17", CORNER, "Is the big star above the red sphere?", "yes", (1, 0)),
        ("qa17", CORNER, "Is the red sphere to the left of the big star?", "no", (0, 1)),
        (
            "qa18",
            ["The box is bigger than the egg.", "The box fits inside the tub."],
            "Does the tub fit in the egg?",
            "no",
            (0, 1),
        ),
        ("qa19", LINE, "How do you go from the office to the kitchen?", "w,w", (1, 0)),
        ("qa20", ["Yann is tired.", *moves("Yann bedroom")], "Why did yann go to the bedroom?", "tired", (0,)),
    ],
)
def test_solver_on_small_stories(task, facts, question, answer, support):
    assert babi.solve(facts, question, task) == (answer, support)


@pytest.mark.parametrize(
    ("task", "facts", "question"),
    [
        ("qa1", moves("John garden"), "Where is Mary?"),
        ("qa2", moves("John garden"), "Where is the milk?"),
        ("qa2", ["John got the milk there."], "Where is the milk?"),
        ("qa3", ["John got the milk.", *moves("John garden")], "Where was the milk before the garden?"),
        ("qa1", ["John danced in the garden."], "Where is John?"),
        ("qa1", ["John is in the garden."], "Where is John?"),
        ("qa1", moves("John garden"), "Who is John?"),
        ("qa4", LINE, "What is north of the hallway?"),
        ("qa5", HANDED, "Who received the apple?"),
        ("qa8", moves("John garden"), "What is John carrying?"),
        ("qa9", ["Mary is not in the office."], "Is Mary in the garden?"),
        ("qa14", ["Mary went to the park this morning."], "Where was Mary before the park?"),
        ("qa15", ["Emily is a sheep."], "What is emily afraid of?"),
        ("qa16", SWANS[2:], "What color is Brian?"),
        ("qa17", CORNER, "Is the box above the green star?"),
        ("qa18", ["The box is bigger than the egg."], "Does the tub fit in the egg?"),
        ("qa19", LINE, "How do you go from the office to the garden?"),
        ("qa20", ["Yann is tired."], "Why did yann go to the kitchen?"),
    ],
)
def test_solver_refuses_what_the_story_does_not_say(task, facts, question):
    with pytest.raises(ValueError):
        babi.solve(facts, question, task)
