"""Scoring rules of BABILong (Kuratov et al. 2024), the passkey and plain data sets, and Wilson's interval."""

import math
import re
import unicodedata

from lrmt.tasks.names import LABELS, NUMBERS, TASK_LABELS, is_answer, split_target

__all__ = ["RULES", "TASK_LABELS", "is_answer", "score", "wilson_interval"]

RULES = ("official", "strict", "contains", "exact")


def score(target: str, output: str, question: str, task: str, rule: str = "official") -> bool:
    """Whether `output`, the decoded answer of a model, is right.

    `rule` (bAbI tasks, and memorize, detect_memorize, reasoning, whose answers are rooms):
      official  first sentence, labels of the task found as substrings, minus those that the question names: exactly
                the target must remain. Compatible to the letter with BABILong's own metric, its defect included: for
                qa7 "one" is a substring of "none", so a target "none" never scores.
      strict    the same with whole-word labels, which mends qa7.
      contains  the target is a substring of the output, case ignored (as lm-evaluation-harness reports).
      exact     the first line equals the target, case and outer spaces ignored; of a target of k lines the first k.
    Tasks "passkey" and "niah_single": the first integer of the output equals the target, whatever the rule. The
    user's own rows (task "dataset") have no labels: `official` and `strict` mean `exact` there.
    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    if task in NUMBERS:
        return _first_integer(output) == int(target)
    if rule == "contains":
        return _plain(target) in _plain(output)
    if rule == "exact" or task not in LABELS:
        count = len(_plain(target).splitlines())
        return _first_lines(output, count) == _first_lines(target, count)
    return _labels_match(target, output, question, LABELS[task], whole_words=rule == "strict")


def _labels_match(target, output, question, labels, whole_words):
    answer = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    mentioned = _find_labels(answer, labels, whole_words) - _find_labels(question.lower(), labels, whole_words)
    return mentioned == split_target(target, labels)


def _find_labels(text, labels, whole_words):
    if whole_words:
        return {label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)}
    return {label for label in labels if label in text}


def _first_integer(text):
    match = re.search(r"\d+", text, re.ASCII)
    return int(match.group()) if match else None


def _first_lines(text, count):
    return _plain("\n".join(_plain(text).splitlines()[:count]))


def _plain(text):
    """Without outer spaces and case, and every character spelled one way: "é" is one or two of Unicode's."""
    return unicodedata.normalize("NFC", text).strip().lower()


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default: (low, high), both in 0..1.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"need 0 <= successes <= n and n > 0; got {successes} and {n}")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the bound is exact; rounding must not move it.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)
