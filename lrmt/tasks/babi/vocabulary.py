"""The words of the stories: verbs as in the files; people, places and things that a file may replace."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from lrmt.errors import UsageError, suggest
from lrmt.files import read_text

GO = ("went to", "moved to", "journeyed to", "travelled to", "went back to")
GET = ("got", "grabbed", "picked up", "took")
DROP = ("discarded", "dropped", "left", "put down")
GIVE = ("gave", "handed", "passed")
THEN = ("Then", "After that", "Afterwards", "Following that")
TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COMPASS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
SIDES = {"above": (0, 1), "below": (0, -1), "to the right of": (1, 0), "to the left of": (-1, 0)}


@dataclass(frozen=True)
class Words:
    """The people, places and things of one task."""

    people: Mapping[str, str]  # name -> he or she
    rooms: tuple[str, ...]
    objects: tuple[str, ...]
    species: Mapping[str, str]  # singular -> plural
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    containers: tuple[str, ...]  # every story orders their sizes anew
    contents: tuple[str, ...]  # smaller than any container, each smaller than the one before
    moods: Mapping[str, tuple[str, str]]  # mood -> (room to go to, object to get there)


_FILES = Words(
    people={"Daniel": "he", "John": "he", "Mary": "she", "Sandra": "she"},
    rooms=("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"),
    objects=("apple", "football", "milk"),
    species={"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"},
    colours=("gray", "green", "white", "yellow"),
    shapes=("triangle", "pink rectangle", "red square", "blue square", "yellow square", "red sphere"),
    containers=("box", "chest", "container", "suitcase"),
    contents=("box of chocolates", "chocolate"),
    moods={
        "hungry": ("kitchen", "apple"),
        "thirsty": ("kitchen", "milk"),
        "bored": ("garden", "football"),
        "tired": ("bedroom", "pajamas"),
    },
)
PEOPLE, ROOMS, OBJECTS = tuple(_FILES.people), _FILES.rooms, _FILES.objects
_ROOMS_B = ("bedroom", "cinema", "kitchen", "office", "park", "school")
_PEOPLE_C = {"Bill": "he", "Fred": "he", "Julie": "she", "Mary": "she"}
_OF_TASK = {
    "qa5": {"people": {"Bill": "he", "Fred": "he", "Jeff": "he", "Mary": "she"}},
    "qa10": {"people": _PEOPLE_C, "rooms": _ROOMS_B},
    "qa14": {"people": _PEOPLE_C, "rooms": _ROOMS_B},
    "qa15": {"people": {"Emily": "she", "Gertrude": "she", "Jessica": "she", "Winona": "she"}},
    "qa16": {
        "people": {"Bernhard": "he", "Brian": "he", "Greg": "he", "Julius": "he", "Lily": "she"},
        "species": {"swan": "swans", "lion": "lions", "frog": "frogs", "rhino": "rhinos"},
    },
    "qa20": {"people": {"Antoine": "he", "Jason": "he", "Sumit": "he", "Yann": "he"}},
}

_FEWEST = {"people": 2, "rooms": 2, "objects": 1, "species": 2, "colours": 2, "shapes": 3, "containers": 2, "moods": 1}
_FEWEST_OF_TASK = {
    "qa4": {"rooms": 3},
    "qa12": {"rooms": 3},
    "qa13": {"rooms": 3},
    "qa14": {"people": 3},
    "qa15": {"people": 4, "species": 4},
    "qa16": {"people": 5},
    "qa19": {"rooms": 6},
    "qa20": {"people": 4},
}
_GRAMMAR = {"the", "there", "to", "in", "is", "and", "or", "either", "than", "inside", "bigger", *TIMES[0].split()}
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_PHRASE = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern})*")


class Vocabulary:
    """Words that replace those of the files in every task; what is left out stays as in the files.

    The keys are the fields of `Words`. Raises UsageError for an unknown key and for words that the grammar of the
    stories cannot hold.
    """

    def __init__(self, **words):
        known = [field.name for field in fields(Words)]
        for key in words:
            if key not in known:
                _refuse(f"has the key {key!r}", f"known: {', '.join(known)}{suggest(key, known)}")
        self._words = {key: _check(key, value) for key, value in words.items()}

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read a YAML or JSON file such as `{people: {Ann: she, Bob: he}, rooms: [attic, cellar]}`."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"--babi_vocabulary {path} is no file; give a YAML or JSON file with people, rooms, …")
        try:
            words = yaml.safe_load(read_text(path, "--babi_vocabulary"))
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            _refuse(f"{path} is not YAML" + (f" in line {where.line + 1}" if where else ""), "give a YAML or JSON file")
        if not isinstance(words, dict) or not all(isinstance(key, str) for key in words):
            _refuse(f"{path} holds {words!r:.40}", "write keys such as people, rooms and objects, each with its words")
        return cls(**words)

    def of(self, task: str) -> Words:
        """The words of a task; raises UsageError where they are too few for its stories."""
        for key, fewest in (_FEWEST | _FEWEST_OF_TASK.get(task, {})).items():
            if len(self._words.get(key, range(fewest))) < fewest:
                _refuse(f"gives {len(self._words[key])} {key}", f"{task} needs {fewest} or more")
        return Words(**(vars(_FILES) | _OF_TASK.get(task, {}) | self._words))


@functools.cache
def words_of_files(task: str) -> Words:
    """The words of a task's official file."""
    return Vocabulary().of(task)


_ONE_WORD = {"people", "species", "colours"}  # the others may be phrases such as "red square"
_PAIRS = {"people": "{Ann: she, Bob: he}", "species": "{mouse: mice}", "moods": "{hungry: [kitchen, apple]}"}


def _check(key: str, value):
    """The words of one key, as a dictionary or a tuple."""
    like = f"write {key}: {_PAIRS.get(key, '[first, second]')}"
    if not isinstance(value, dict if key in _PAIRS else (list, tuple)) or not value:
        _refuse(f"has {key}: {value!r:.60}", like)
    words, one_word = list(value), key in _ONE_WORD
    if key == "species":
        words += [plural for singular, plural in value.items() if plural != singular]
    elif key == "people" and not {*value.values()} <= {"he", "she"}:
        _refuse(f"has {key}: {value!r:.60}", like)
    elif key == "moods":
        pairs = list(value.values())
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            _refuse(f"has {key}: {value!r:.60}", like)
        value = {mood: tuple(pair) for mood, pair in value.items()}
        words += {part: None for pair in pairs for part in pair}  # moods may share a room or an object
    for word in words:
        if not isinstance(word, str) or not (_WORD if one_word else _PHRASE).fullmatch(word):
            _refuse(f"has {word!r} among its {key}", f"use letters{'' if one_word else ', one space between words'}")
        if _GRAMMAR & {*word.lower().split()}:
            _refuse(f"has {word!r} among its {key}", "leave out the words of the grammar, such as 'the'")
    if len({word.lower() for word in words}) < len(words):
        _refuse(f"has the same word twice in {key}", "write each once")
    if key == "objects" and len(words) >= len(NUMBERS):
        _refuse(f"gives {len(words)} objects", f"stories count up to {NUMBERS[-1]}; give at most {len(NUMBERS) - 1}")
    return value if key in _PAIRS else tuple(value)


def _refuse(fact: str, remedy: str):
    raise UsageError(f"--babi_vocabulary {fact}; {remedy}") from None
