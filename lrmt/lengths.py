"""Names of lengths: 0k, 4k, 1M; 1k = 1000 tokens."""

import re

from lrmt.errors import UsageError


def parse_tokens(length: str) -> int:
    """Tokens in a length: "4k" is 4000, "1M" a million, a plain number itself, "0k" none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", length)
    if match is None:
        raise UsageError(f"--lengths takes 0k (facts alone) or tokens (4k, 1M, 1500); got {length!r}")
    return round(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()])


def spell_length(length: str) -> str:
    """The name of a length's configuration: 4000 is 4k, 1000k is 1M."""
    tokens = parse_tokens(length)
    if tokens and tokens % 1_000_000 == 0:
        return f"{tokens // 1_000_000}M"
    return str(tokens) if tokens % 1000 else f"{tokens // 1000}k"
