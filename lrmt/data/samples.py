"""The tasks that `lrmt data` takes samples of."""

from pathlib import Path

import lrmt
from lrmt.adapters.backbone import open_tokenizer
from lrmt.data.settings import GenerationSettings
from lrmt.tasks.background import open_background
from lrmt.tasks.haystack import HaystackTask
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.registry import build_task

TINY_TOKENIZER = Path(lrmt.__file__).parent / "assets" / "tiny-llama"


def open_tasks(settings: GenerationSettings) -> dict[str, HaystackTask]:
    """The tasks by name, over one background that is long enough for every length."""
    tokenizer = open_tokenizer(settings.tokenizer or str(TINY_TOKENIZER))
    options = TaskOptions.of(settings)
    common = {"split": settings.split, "seed": settings.seed}
    longest = max(map(settings.context_length, settings.lengths))
    background = open_background(tokenizer, options, longest=longest, **common)
    return {
        name: build_task(name, tokenizer, options, background=background, **common)
        for name in dict.fromkeys(settings.task)
    }
