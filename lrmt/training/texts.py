"""Text to which a method is fitted before it is trained."""

from __future__ import annotations

import numpy as np
import torch

from lrmt.tasks import prose
from lrmt.tasks.base import Pieces, derive_rng

PROSE, NUMBERS, LENGTH = 8192, 4096, 128  #: tokens of each, in texts of so many


def draw_texts(tokenizer) -> torch.Tensor:
    """Prose and, of which prose has few, numbers, as ids `[N, LENGTH]`: the same for every run."""
    pieces, rng = Pieces(tokenizer), derive_rng("numbers")
    numbers = [str(rng.integers(10**digits)) for digits in rng.integers(1, 8, NUMBERS)]
    texts = ((prose.write(PROSE, 0), PROSE), (numbers, NUMBERS))
    ids = np.concatenate([np.concatenate(pieces.encode(sentences))[:count] for sentences, count in texts])
    return torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
