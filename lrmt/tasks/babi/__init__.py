"""bAbI: read the official text files, simulate all twenty tasks without them, and solve any story by replay.

The simulator reproduces the measured statistics of the v1.2 English files (grammar, cadence, choice of questions,
labels, support); the solver reads nothing but text, so that each can be tested against the other and the files.
"""

from lrmt.tasks.babi.files import BabiSample, read
from lrmt.tasks.babi.notes import find_cast, first_note, take_notes
from lrmt.tasks.babi.simulate import SIMULATED, answers, simulate, simulate_question, simulate_story
from lrmt.tasks.babi.solve import solve
from lrmt.tasks.babi.vocabulary import DROP, GET, GO, OBJECTS, PEOPLE, ROOMS, Vocabulary

__all__ = [
    "BabiSample",
    "DROP",
    "GET",
    "GO",
    "OBJECTS",
    "PEOPLE",
    "ROOMS",
    "SIMULATED",
    "Vocabulary",
    "answers",
    "find_cast",
    "first_note",
    "read",
    "simulate",
    "simulate_question",
    "simulate_story",
    "solve",
    "take_notes",
]
