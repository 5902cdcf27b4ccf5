import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrmt.errors import UsageError
from lrmt.tasks.base import Pieces, check_segment, derive_rng, derive_seed, epoch_order, join


def test_seed_is_the_same_in_every_process_and_differs_in_every_part():
    code = "from lrmt.tasks.base import derive_seed; print(derive_seed(3, 'train', 'qa1', 512, 7))"
    here = derive_seed(3, "train", "qa1", 512, 7)
    environment = {"PYTHONHASHSEED": "1", "PATH": ""}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout) == here
    others = [
        derive_seed(*parts)
        for parts in (
            (4, "train", "qa1", 512, 7),
            (3, "test", "qa1", 512, 7),
            (3, "train", "qa2", 512, 7),
            (3, "train", "qa1", 513, 7),
            (3, "train", "qa1", 512, 8),
        )
    ]
    assert len({here, *others}) == 6
    assert derive_rng(1, "a").integers(1 << 40) == derive_rng(1, "a").integers(1 << 40)


def test_epoch_order_permutes_every_epoch_anew_and_in_any_order():
    orders = [[epoch_order(50, epoch * 50 + i, 0, "qa1") for i in range(50)] for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != list(range(50))
    assert [epoch_order(50, i, 0, "qa1") for i in reversed(range(50))] == orders[0][::-1]
    assert [epoch_order(50, i, 1, "qa1") for i in range(50)] != orders[0]


def test_pieces_put_one_space_before_each_text(tokenizer):
    pieces = Pieces(tokenizer)
    assert pieces.prefix == " "
    ids = pieces("  Where is Mary? ")
    assert tokenizer.decode(ids) == " Where is Mary?"
    assert ids.dtype == np.int64
    assert pieces.encode(["Where is Mary?"])[0].tolist() == ids.tolist()
    assert pieces.encode([]) == []
    assert tokenizer.decode(pieces.answer("kitchen")) == " kitchen</s>"
    with pytest.raises(ValueError):
        ids[0] = 0  # shared between examples


def test_pieces_add_no_second_space_where_the_tokenizer_adds_one():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁": 1, "</s>": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    prepending = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert Pieces(prepending)("a").tolist() == [0]


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    backend = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    backend.eos_token = None
    with pytest.raises(UsageError, match="no EOS token"):
        Pieces(backend)


def test_join_and_check_segment():
    assert join([]).dtype == np.int64
    assert join([np.array([1, 2]), np.array([3], dtype=np.int32)]).tolist() == [1, 2, 3]
    check_segment(np.zeros(6), np.zeros(2), 8, "row 1")
    check_segment(np.zeros(6), np.zeros(2), None, "row 1")
    with pytest.raises(UsageError, match=r"--segment_length 7 .* row 1 take 8 tokens; raise it to 8"):
        check_segment(np.zeros(6), np.zeros(2), 7, "row 1")
