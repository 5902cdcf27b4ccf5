"""The one exception that the command line turns into one line and exit code 2."""


class UsageError(ValueError):
    """Bad input: the message is one line naming the flag, the value received and the remedy."""
