"""Bad input, and how it ends."""

from __future__ import annotations

import contextlib
import sys


class UsageError(ValueError):
    """Bad input: the message is one line naming the flag, the value received and the remedy."""


@contextlib.contextmanager
def exit_on_usage_error():
    """Turns a `UsageError` into its one line on stderr and exit code 2."""
    try:
        yield
    except UsageError as error:
        print(f"lrmt: error: {error}", file=sys.stderr)
        sys.exit(2)
