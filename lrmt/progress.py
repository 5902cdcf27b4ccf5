"""How far work is: a bar on a terminal, now and then a line in a file or a pipe."""

from __future__ import annotations

import os
import sys
import time

#: a line is due after this many seconds and this share of the work, whichever takes longer
SECONDS, SHARE = 30.0, 0.01

#: other libraries' bars: the module, the function that switches them off, and the variable that does so before the import
LIBRARIES = (
    ("transformers.utils.logging", "disable_progress_bar", "HF_HUB_DISABLE_PROGRESS_BARS"),
    ("huggingface_hub.utils", "disable_progress_bars", "HF_HUB_DISABLE_PROGRESS_BARS"),
    ("datasets.utils", "disable_progress_bars", "HF_DATASETS_DISABLE_PROGRESS_BARS"),
    ("tqdm", None, "TQDM_DISABLE"),
)


def progress(
    total: float | None,
    unit: str,
    desc: str | None = None,
    initial: int = 0,
    disable: bool = False,
    unit_scale: bool = False,
    leave: bool = True,
):
    """A tqdm bar on stderr; where that is no terminal, `Lines`, with the same methods.

    Args:
        total: of units, or None if unknown. unit_scale: 12M instead of 12000000. leave: the end stays to be read.
    """
    options = {"total": total, "unit": unit, "desc": desc, "initial": initial, "unit_scale": unit_scale, "leave": leave}
    if not disable and not sys.stderr.isatty():
        return Lines(**options)
    from tqdm import tqdm

    return tqdm(**options, disable=disable, dynamic_ncols=True, smoothing=0.05, file=sys.stderr)


class Lines:
    """The part of tqdm that lrmt uses, as plain lines on stderr: after `SECONDS` and `SHARE` of the work, and at the end."""

    def __init__(self, total, unit, desc=None, initial=0, unit_scale=False, leave=True):
        self.total, self.unit, self.desc, self.unit_scale, self.leave = total, unit, desc, unit_scale, leave
        self.n = self.initial = self.shown = initial
        self.began = self.shown_at = time.monotonic()
        self.postfix, self.open = None, True

    def update(self, n: float = 1) -> None:
        self.n += n
        enough = self.n - self.shown >= SHARE * (self.total or 0)
        if enough and time.monotonic() - self.shown_at >= SECONDS:
            self._show()

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        self.desc = desc

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self.postfix = s

    @staticmethod
    def write(s: str) -> None:
        print(s)

    def close(self) -> None:
        if self.open and self.leave and self.n > self.shown:
            self._show()
        self.open = False

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, error, *_) -> None:
        self.open = self.open and error is None  # what went wrong is said by the error
        self.close()

    def _show(self) -> None:
        from tqdm import tqdm

        self.shown, self.shown_at = self.n, time.monotonic()
        print(
            tqdm.format_meter(
                self.n,
                self.total,
                self.shown_at - self.began,
                prefix=f"{self.desc}: " if self.desc else "",
                unit=self.unit,
                unit_scale=self.unit_scale,
                postfix=self.postfix,
                initial=self.initial,
                bar_format="{desc}{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            ),
            file=sys.stderr,
            flush=True,
        )


def quiet_bars() -> None:
    """Switches off the bars of other libraries, imported or not, where stderr is no terminal. Imports nothing."""
    if sys.stderr.isatty():
        return
    for module, switch_off, variable in LIBRARIES:
        if module not in sys.modules:
            os.environ.setdefault(variable, "1")
        elif switch_off is not None:
            getattr(sys.modules[module], switch_off)()
