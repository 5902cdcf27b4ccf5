"""Names of tasks, splits and choices, and the answers that a task knows, which generation checks and scoring looks for."""

SPLITS = ("train", "validation", "test")
BABI = tuple(f"qa{n}" for n in range(1, 21))
MEMORIES = ("memorize", "detect_memorize", "reasoning")
NEEDLES = ("niah_single", *MEMORIES)
#: whose answer is a number, the first that is said
NUMBERS = ("passkey", "niah_single")
#: facts hidden in background text
HAYSTACKS = (*BABI, *NEEDLES)
#: every task whose texts are generated
GENERATED = ("passkey", *HAYSTACKS)
#: what `--task` of a recipe knows
TASKS = (*GENERATED, "dataset", "text")


def split_mixture(task: str) -> list[str]:
    """The tasks of a mixture such as "qa1, qa2"."""
    return [name.strip() for name in task.split(",")]


#: for errors and help
KNOWN_TASKS = f"passkey, qa1..qa20, dataset, text, {', '.join(NEEDLES)}"
KNOWN_HAYSTACKS = f"qa1, … qa20, {', '.join(NEEDLES)}"

#: where a question stands relative to its context
QUESTION_POSITIONS = ("last", "first", "both")
PASSKEY_WORDINGS = ("plain", "landmark", "longlora", "infinitebench")

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
YES_NO = ("no", "yes")
DIRECTIONS = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")

#: the answer sets of the bAbI files
TASK_LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), ROOMS),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), YES_NO),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", *YES_NO),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": DIRECTIONS,
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}

#: every task whose answer is one of a few words
LABELS = TASK_LABELS | dict.fromkeys(MEMORIES, ROOMS)


def is_answer(target: str, task: str) -> bool:
    """Whether `target` can be the answer of a task of LABELS: a label of it or, of qa8, several."""
    labels = LABELS[task]
    return split_target(target, labels) <= set(labels) and (task == "qa8" or target.lower() in labels)


def split_target(target: str, labels) -> set[str]:
    """The labels in a target: qa8 answers with a list; "n,e" of qa19 is one label."""
    target = target.lower()
    return {target} if target in labels else set(target.split(","))
