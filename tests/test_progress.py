"""Bars: of ours, lines where the output is no terminal; of other libraries, nothing there."""

import subprocess
import sys

import pytest
from tqdm import tqdm

from lrmt import progress as module
from lrmt.progress import Lines, progress


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(10, "step") as bar:
        assert isinstance(bar, tqdm)


@pytest.mark.parametrize(
    ("total", "seconds", "shown"),
    [
        (100, 1.0, [30, 60, 90]),  # half a minute is rarer
        (None, 10.0, list(range(3, 100, 3))),
        (4000, 60.0, [40, 80]),  # 1 % is rarer
    ],
)
def test_a_line_every_half_minute_or_every_percent_whichever_is_rarer(clock, capfd, total, seconds, shown):
    with progress(total, "step", "stage 1") as bar:
        assert isinstance(bar, Lines)
        for _ in range(100):
            clock(seconds)
            bar.update()
            bar.set_postfix_str("loss 1.5", refresh=False)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert "\r" not in err and not out
    begin = [f"stage 1: {n}/" for n in dict.fromkeys([*shown, 100])]
    assert [line[: line.index("/") + 1] for line in lines] == begin, err
    assert all("loss 1.5" in line for line in lines)


def test_an_error_is_not_followed_by_a_line(clock, capfd):
    with pytest.raises(ValueError), progress(10, "step") as bar:
        bar.update()
        raise ValueError
    with progress(10, "token", leave=False) as bar:  # nor is what nobody waits for
        bar.update()
    with progress(10, "step", disable=True) as bar:
        bar.update()
        bar.set_description("nothing")
    assert capfd.readouterr() == ("", "")


def test_work_that_shrinks_ends_at_its_total(clock, capfd):
    with progress(10, "answer") as bar:
        bar.total -= 6
        bar.update(4)
    assert capfd.readouterr().err.startswith("4/4 answer")


QUIET = """
import sys
if {first}: import transformers.utils.logging, datasets.utils, huggingface_hub.utils
before = set(sys.modules)
from lrmt.progress import quiet_bars
quiet_bars()
assert not {{"transformers", "datasets", "tqdm", "torch"}} & (set(sys.modules) - before)
import datasets.utils, huggingface_hub.utils, transformers.utils.logging
assert not transformers.utils.logging.is_progress_bar_enabled()
assert huggingface_hub.utils.are_progress_bars_disabled() and datasets.utils.are_progress_bars_disabled()
from tqdm import tqdm
assert {first} or tqdm(range(3)).disable  # those of libraries that have no switch
"""


@pytest.mark.parametrize("first", [False, True], ids=["before they are imported", "after"])
def test_other_libraries_are_quiet(first):
    done = subprocess.run([sys.executable, "-c", QUIET.format(first=first)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
