"""Prompts for instruction-tuned models: what each bAbI task asks for, two examples, and the form of the answer."""

from collections.abc import Iterable
from dataclasses import dataclass

TEMPLATE = "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"
PARTS = ("instruction", "examples", "post_prompt")
#: what every contender may say at least; a trained model stops by itself
NEW_TOKENS = 20

OPENING = "Somewhere in a long text there are short statements about {}. Ignore everything else in it."
PLACE = "Reply with the name of one place and nothing else."
YES_NO = "Reply with yes or no and nothing else."


@dataclass(frozen=True)
class TaskPrompt:
    """`samples` are (statements, question, answer)."""

    instruction: str
    samples: tuple[tuple[str, str, str], tuple[str, str, str]]
    post_prompt: str

    @property
    def examples(self) -> str:
        return "\n\n".join(
            f"<example>\n{statements}\nQuestion: {question}\nAnswer: {answer}\n</example>"
            for statements, question, answer in self.samples
        )


PROMPTS = {
    "qa1": TaskPrompt(
        OPENING.format("people who move around a house") + " A person is where the last statement about them says.",
        (
            (
                "Nora walked to the kitchen. Peter ran to the garden. Nora left for the hallway.",
                "Where is Nora?",
                "hallway",
            ),
            ("Peter entered the office. Nora strolled to the bedroom.", "Where is Peter?", "office"),
        ),
        PLACE,
    ),
    "qa2": TaskPrompt(
        OPENING.format("people who move around a house and carry things")
        + " A thing moves with whoever holds it, and stays where it was put down.",
        (
            (
                "Nora picked up the football. Nora walked to the garden. Peter ran to the kitchen.",
                "Where is the football?",
                "garden",
            ),
            (
                "Peter went to the office. Peter took the milk. Peter walked to the hallway. Peter put down the milk. "
                "Peter ran to the bedroom.",
                "Where is the milk?",
                "hallway",
            ),
        ),
        PLACE,
    ),
    "qa3": TaskPrompt(
        OPENING.format("people who move around a house and carry things")
        + " Follow the thing from place to place, and tell where it was just before it came to the place in the question.",
        (
            (
                "Nora took the apple. Nora went to the kitchen. Nora walked to the office.",
                "Where was the apple before the office?",
                "kitchen",
            ),
            (
                "Peter walked to the bathroom. Peter picked up the milk. Peter ran to the garden. Peter left for the bedroom. "
                "Peter dropped the milk. Peter went to the hallway.",
                "Where was the milk before the bedroom?",
                "garden",
            ),
        ),
        PLACE,
    ),
    "qa4": TaskPrompt(
        OPENING.format("which room lies in which direction from another"),
        (
            (
                "The bedroom is north of the hallway. The kitchen is south of the hallway.",
                "What is north of the hallway?",
                "bedroom",
            ),
            (
                "The garden is east of the office. The bathroom is west of the office.",
                "What is the bathroom west of?",
                "office",
            ),
        ),
        PLACE,
    ),
    "qa5": TaskPrompt(
        OPENING.format("people who hand things to each other") + " When several fit the question, the last one counts.",
        (
            ("Mary handed the milk to Fred. Fred walked to the garden.", "What did Mary give to Fred?", "milk"),
            ("Bill passed the football to Jeff. Mary took the apple.", "Who received the football?", "Jeff"),
        ),
        "Reply with one word, the person or the thing asked for.",
    ),
    "qa6": TaskPrompt(
        OPENING.format("people who move around a house") + " A person is where the last statement about them says.",
        (
            ("Nora walked to the kitchen. Peter went to the office.", "Is Nora in the kitchen?", "yes"),
            ("Peter ran to the garden. Peter left for the bathroom.", "Is Peter in the garden?", "no"),
        ),
        YES_NO,
    ),
    "qa7": TaskPrompt(
        OPENING.format("people who take, drop and hand over things")
        + " Count what the person still holds when all of it has happened.",
        (
            (
                "Nora took the apple. Nora picked up the milk. Nora walked to the hallway.",
                "How many objects is Nora carrying?",
                "two",
            ),
            (
                "Peter got the football. Peter handed the football to Nora.",
                "How many objects is Peter carrying?",
                "none",
            ),
        ),
        "Reply with one word: none, one, two or three.",
    ),
    "qa8": TaskPrompt(
        OPENING.format("people who take and drop things")
        + " Name what the person still holds when all of it has happened.",
        (
            (
                "Nora took the apple. Nora went to the garden. Nora picked up the milk.",
                "What is Nora carrying?",
                "apple,milk",
            ),
            ("Peter took the football. Peter put down the football.", "What is Peter carrying?", "nothing"),
        ),
        "Reply with the things alone, a comma between them, or with the word nothing.",
    ),
    "qa9": TaskPrompt(
        OPENING.format("where people are, and where they are not") + " The last statement about a person counts.",
        (
            ("Nora is in the office. Peter is no longer in the garden.", "Is Nora in the office?", "yes"),
            ("Nora walked to the kitchen. Peter is not in the bedroom.", "Is Peter in the bedroom?", "no"),
        ),
        YES_NO,
    ),
    "qa10": TaskPrompt(
        OPENING.format("where people are, some of which leave two places open")
        + " The last statement about a person counts. Where it leaves open whether they are in the place asked for, the answer is maybe.",
        (
            (
                "Nora is either in the kitchen or the park. Peter walked to the school.",
                "Is Nora in the kitchen?",
                "maybe",
            ),
            ("Nora ran to the office. Peter is in the cinema.", "Is Peter in the park?", "no"),
        ),
        "Reply with yes, no or maybe and nothing else.",
    ),
    "qa11": TaskPrompt(
        OPENING.format("people who move around a house")
        + " He or she means the person of the statement before. The last move of a person counts.",
        (
            ("Nora walked to the kitchen. Afterwards she went to the garden.", "Where is Nora?", "garden"),
            (
                "Peter ran to the office. Then he left for the hallway. Nora walked to the bedroom. Next she went to the bathroom.",
                "Where is Peter?",
                "hallway",
            ),
        ),
        PLACE,
    ),
    "qa12": TaskPrompt(
        OPENING.format("people who move around a house in pairs")
        + " The last move of a person counts, whoever went along.",
        (
            ("Nora and Peter walked to the kitchen. Peter and Clara went to the garden.", "Where is Nora?", "kitchen"),
            ("Clara and Nora ran to the office. Nora and Peter left for the bedroom.", "Where is Peter?", "bedroom"),
        ),
        PLACE,
    ),
    "qa13": TaskPrompt(
        OPENING.format("people who move around a house in pairs")
        + " They means the two people of the statement before. The last move of a person counts.",
        (
            ("Nora and Peter walked to the kitchen. Then they went to the office.", "Where is Peter?", "office"),
            (
                "Clara and Nora ran to the hallway. After that they left for the bathroom. Nora and Peter walked to the garden. "
                "Afterwards they went to the bedroom.",
                "Where is Clara?",
                "bathroom",
            ),
        ),
        PLACE,
    ),
    "qa14": TaskPrompt(
        OPENING.format("where people went and when, told in any order")
        + " Order the person's moves in time: yesterday, this morning, this afternoon, this evening.",
        (
            (
                "This morning Nora went to the park. Yesterday Nora walked to the school. This afternoon Nora left for the cinema.",
                "Where was Nora before the cinema?",
                "park",
            ),
            (
                "Peter went to the kitchen this evening. Peter ran to the office this afternoon.",
                "Where was Peter before the kitchen?",
                "office",
            ),
        ),
        PLACE,
    ),
    "qa15": TaskPrompt(
        OPENING.format("which animals fear which, and which animal somebody is")
        + " One who is an animal fears what that animal fears.",
        (
            (
                "Mice are afraid of wolves. Cats are afraid of sheep. Nora is a mouse.",
                "What is nora afraid of?",
                "wolf",
            ),
            (
                "Wolves are afraid of cats. Sheep are afraid of mice. Peter is a wolf. Clara is a sheep.",
                "What is clara afraid of?",
                "mouse",
            ),
        ),
        "Reply with one animal in the singular: cat, mouse, sheep or wolf.",
    ),
    "qa16": TaskPrompt(
        OPENING.format("what kind of animal somebody is, and of what color")
        + " Expect animals of one kind to share a color; if two of a kind differ, the last one told counts.",
        (
            ("Nora is a swan. Peter is a frog. Nora is white. Clara is a swan.", "What color is Clara?", "white"),
            (
                "Peter is a lion. Clara is a rhino. Peter is yellow. Clara is gray. Nora is a lion.",
                "What color is Nora?",
                "yellow",
            ),
        ),
        "Reply with one color: gray, green, white or yellow.",
    ),
    "qa17": TaskPrompt(
        OPENING.format("how colored shapes lie to each other")
        + " Join the statements to compare the two shapes asked about.",
        (
            (
                "The triangle is above the red square. The blue square is below the red square.",
                "Is the triangle above the blue square?",
                "yes",
            ),
            (
                "The pink rectangle is to the left of the triangle. The red sphere is to the right of the triangle.",
                "Is the pink rectangle to the right of the red sphere?",
                "no",
            ),
        ),
        YES_NO,
    ),
    "qa18": TaskPrompt(
        OPENING.format("which things are bigger than others or fit into them")
        + " A thing fits into every bigger one; join the statements to compare the two asked about.",
        (
            (
                "The box is bigger than the chest. The chocolate fits inside the chest.",
                "Does the chocolate fit in the box?",
                "yes",
            ),
            (
                "The suitcase is bigger than the container. The container is bigger than the chest.",
                "Is the chest bigger than the suitcase?",
                "no",
            ),
        ),
        YES_NO,
    ),
    "qa19": TaskPrompt(
        OPENING.format("which room lies in which direction from another")
        + " Find the way between the two rooms asked about; it takes two steps.",
        (
            (
                "The office is north of the hallway. The garden is east of the office.",
                "How do you go from the hallway to the garden?",
                "n,e",
            ),
            (
                "The kitchen is west of the bedroom. The bathroom is south of the kitchen.",
                "How do you go from the bedroom to the bathroom?",
                "w,s",
            ),
        ),
        "Reply with the two steps alone, n, e, s or w each, and a comma between them.",
    ),
    "qa20": TaskPrompt(
        OPENING.format("how people feel, where they go and what they take")
        + " The hungry and the thirsty go to the kitchen, the bored to the garden, the tired to the bedroom; "
        "how people feel is why they go there and why they take things.",
        (
            ("Nora is thirsty. Peter is tired.", "Where will peter go?", "bedroom"),
            (
                "Nora is hungry. Nora went to the kitchen. Nora took the apple there.",
                "Why did nora get the apple?",
                "hungry",
            ),
        ),
        "Reply with one word, the place or the feeling.",
    ),
}


def count_new_tokens(task) -> int:
    """How long an answer to a task (tasks.base.Task) may be, whoever gives it."""
    return max(task.max_new_tokens, NEW_TOKENS)


def prompt_parts(task: str, parts: Iterable[str] = PARTS) -> dict[str, str]:
    """The texts that go before the context, "" for those left out; tasks other than bAbI's have none.

    Raises ValueError for a part that is none of PARTS.
    """
    parts = set(parts)
    if unknown := parts - set(PARTS):
        raise ValueError(f"parts of a prompt are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    return {part: getattr(PROMPTS[task], part) if task in PROMPTS and part in parts else "" for part in PARTS}


def build_prompt(task: str, context: str, question: str, parts: Iterable[str] = PARTS) -> str:
    """The whole prompt by TEMPLATE; a part left out takes its blank line with it."""
    before = prompt_parts(task, parts)
    template = TEMPLATE
    for part, text in before.items():
        template = template if text else template.replace(f"{{{part}}}\n\n", "")
    return template.format(context=context.strip(), question=question.strip(), **before)
