import numpy as np

from lrmt.tasks.base import Example
from lrmt.training.collate import collate


def test_collate_pads_right_and_scores_only_answers():
    short = Example(np.array([5, 6]), np.array([7, 2]), "q", "a", "t")
    long = Example(np.array([5, 6, 8, 9]), np.array([3, 7, 2]), "q", "a", "t")
    batch = collate([short, long], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 0, 0, 0], [5, 6, 8, 9, 3, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2, -100, -100, -100], [-100] * 4 + [3, 7, 2]]


def test_an_eos_that_is_also_the_pad_token_is_still_scored_once():
    example = Example(np.array([5]), np.array([7, 2]), "q", "a", "t")
    longer = Example(np.array([5, 5, 5]), np.array([7, 2]), "q", "a", "t")
    batch = collate([example, longer], pad_token_id=2)
    assert batch["labels"][0].tolist() == [-100, 7, 2, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
