"""Every spelling of a length: 8 (segments), 4k, 1M, 1500 (tokens; 1k = 1000), 0k (facts alone); parsed and printed."""

from __future__ import annotations

import re

from lrmt.errors import UsageError

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")


def parse_tokens(length: str, thousand: int = 1000, flag: str = "--lengths") -> int:
    """Tokens in a length of `flag`: "4k" is 4000, "1M" a million, a plain number itself, "0k" none.

    `thousand`: what k means, 1024 for some public tasks. Raises UsageError for what is no length.
    """
    match = _TOKENS.fullmatch(str(length))
    if match is None:
        raise UsageError(f"{flag} takes 0k (facts alone) or tokens (4k, 1M, 1500); got {length!r}")
    unit = {"": 1, "k": thousand, "m": thousand**2}[match[2].lower()]
    return round(float(match[1]) * unit)


def parse_segments(length: str, segment_length: int | None = None, flag: str = "--lengths") -> int:
    """Segments in a length of `flag`: "8" is 8 segments, "4k" or "1M" are tokens, rounded down to whole segments; "0k" is 0.

    Without `segment_length` only the spelling is checked, and a length in tokens counts as 1.
    """
    match = _TOKENS.fullmatch(str(length))
    if match is None or (not match[2] and "." in match[1]):
        raise UsageError(f"{flag} takes segments (8) or tokens (4k, 0.5M); got {length!r}")
    if match[2]:
        tokens = parse_tokens(length)
        if tokens == 0:
            return 0
        segments = 1 if segment_length is None else tokens // segment_length
        if segments < 1:
            raise UsageError(f"{flag} {length} is less than one segment of {segment_length} tokens; ask for more")
        return segments
    if int(match[1]) < 1:
        raise UsageError(f"{flag} must be at least one segment; got {length!r}")
    return int(match[1])


def spell_length(length: str) -> str:
    """The name of a length's configuration: 4000 is 4k, 1000k is 1M."""
    tokens = parse_tokens(length)
    if tokens and tokens % 1_000_000 == 0:
        return f"{tokens // 1_000_000}M"
    return str(tokens) if tokens % 1000 else f"{tokens // 1000}k"


def format_tokens(tokens: int) -> str:
    """For people: 0k (as BABILong has it), 512, 1k, 8.2k, 16k, 1M; at most three figures, 1k = 1000."""
    if tokens < 1000:
        return str(tokens or "0k")
    value, unit = (tokens / 1000, "k") if tokens < 999_500 else (tokens / 1_000_000, "M")
    return f"{value:.1f}".removesuffix(".0") + unit if value < 10 else f"{value:.0f}{unit}"
