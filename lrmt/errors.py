"""What can go wrong, and how it ends: one line on stderr."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: the message is one line naming the flag, the value received and the remedy. Exit code 2."""


class TrainingFault(RuntimeError):
    """A run that cannot go on, though nothing is wrong with the code: one line with the remedy. Exit code 1."""


@contextlib.contextmanager
def exit_on_error():
    """Turns a `UsageError` or a `TrainingFault` into its one line on stderr and its exit code.

    What is printed meanwhile is what the terminal can show, with ? for the rest, whatever the locale.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except (UsageError, TrainingFault) as error:
        print(f"lrmt: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def suggest(word: str, known: Iterable[str], quote: str = "") -> str:
    """'; did you mean …?' for a near miss, else nothing; the suggestion stands between `quote`s."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {quote}{near[0]}{quote}?" if near else ""


def one_line(error: Exception) -> str:
    """Another library's message, cut to one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
