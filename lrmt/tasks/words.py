"""Where a text says something, in any script."""

import re
from bisect import bisect_right
from unicodedata import category, is_normalized, normalize

#: scripts without spaces between words: from Thai to Myanmar, Khmer, Han and kana; and Korean, whose particles stand at the word itself
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff]"
)
_IN_NUMBER = re.compile(r"\d[.,]\d")


def find_words(words: str, text: str, begin: int = 0) -> int:
    """The end of the first place, from `begin` on, where the text says the words, not as a part of others; 0 if it never does.

    Any white space is as good as any other, and a letter with its accents as good as an accented letter (NFC).
    """
    if not is_normalized("NFC", text):
        composed = normalize("NFC", text)
        end = find_words(words, composed, len(normalize("NFC", text[:begin])))
        # the longest beginning that is no longer when composed
        return bisect_right(range(len(text) + 1), end, key=lambda n: len(normalize("NFC", text[:n]))) - 1 if end else 0
    said = re.compile(r"\s+".join(map(re.escape, normalize("NFC", words).split())))
    found = said.search(text, begin)
    while found and (_goes_on(text, found.start()) or _goes_on(text, found.end())):
        found = said.search(text, found.start() + 1)
    return found.end() if found else 0


def _goes_on(text: str, at: int) -> bool:
    """Whether a word, a number, or a letter with its accents goes on at this place."""
    if not 0 < at < len(text):
        return False
    return (
        (_is_of_word(text[at - 1]) and _is_of_word(text[at]))
        or category(text[at])[0] == "M"
        or any(_IN_NUMBER.fullmatch(text, max(0, begin), begin + 3) for begin in (at - 2, at - 1))
    )


def _is_of_word(letter: str) -> bool:
    return (letter == "_" or category(letter)[0] in "LMN") and not _UNSPACED.match(letter)
