"""Words are found in any script, and not inside others."""

import time

import pytest

from lrmt.tasks.words import find_words

WHERE = [
    ("厨房", "钥匙在厨房里。", "钥匙在厨房"),
    ("台所", "鍵は台所にある。", "鍵は台所"),
    ("ห้องครัว", "กุญแจอยู่ในห้องครัวนะ", "กุญแจอยู่ในห้องครัว"),
    ("부엌", "열쇠는 부엌에 있다.", "열쇠는 부엌"),
    ("5", "第5章", "第5"),
    ("Tokyo", "彼はTokyoに行った", "彼はTokyo"),
    ("no", "Nobody has no key.", "Nobody has no"),
    ("ताब", "किताब और ताब", "किताब और ताब"),  # a vowel sign is no space
    ("5", "3.5 of 1,500 are 5.", "3.5 of 1,500 are 5"),
    ("500", "1,500", ""),
    ("3.5", "It is 3.5.", "It is 3.5"),
    ("under the mat", "It is under\n  the\u00a0mat.", "It is under\n  the\u00a0mat"),
    (" mat. ", "the mat.Then", "the mat."),
    ("a a", "ba a a", "ba a a"),  # which overlaps with what is none
    ("caf\u00e9", "The cafe\u0301 is near.", "The cafe\u0301"),
    ("cafe\u0301", "The caf\u00e9 is near.", "The caf\u00e9"),
    ("near", "Cafe\u0301s a\u0323\u0302 near.", "Cafe\u0301s a\u0323\u0302 near"),
    ("cafe", "The cafe\u0301 is near.", ""),
    ("ก", "ก็", ""),
]  # fmt: skip


@pytest.mark.parametrize(("words", "text", "until"), WHERE)
def test_the_first_place_where_words_are_said(words, text, until):
    assert text[: find_words(words, text)] == until


def test_long_texts_are_read_quickly():
    text = "The cafe\u0301 is near, at 3.5. " * 30_000
    begin = time.perf_counter()
    assert find_words("5", text) == 0 and find_words("mat", f"{text} mat") == len(text) + 4
    assert time.perf_counter() - begin < 5
