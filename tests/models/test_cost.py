"""What reading costs: against torch's own count of matrix products, and published ratios."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from lrmt.adapters.backbone import build_empty
from lrmt.errors import UsageError
from lrmt.models import METHODS, RmtConfig
from lrmt.models.cost import check_known, shape_of

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
SETTINGS = {
    "rmt": {"num_memory_tokens": 8, "segment_length": 64, "memory_handover": "tokens", "memory_shift": True},
    "rmt_retrieval": {"num_memory_tokens": 8, "segment_length": 64},
    "armt": {"num_memory_tokens": 8, "segment_length": 64, "association_dim": 8},
    "landmark": {"block_length": 8, "top_k": 3, "context_length": 128},
}


def test_every_method_has_a_cost():
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("length", [20, 64, 500, 2048])
@pytest.mark.parametrize("method", [*SETTINGS, "backbone"])
def test_flops_are_those_that_torch_counts(method, length):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation="eager").eval()
    shape = shape_of(backbone)
    ids = torch.randint(0, 300, (1, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if method == "backbone":
            backbone.base_model(ids)
            want = shape.run(length)
        else:
            model = METHODS[method].from_backbone(backbone, **SETTINGS[method]).eval()
            labels = torch.full_like(ids, -100)
            labels[:, -1] = 1
            model(ids, labels=labels)
            want = model.config.read_flops(shape, length)
    assert want == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("checkpoint_segments", [False, True])
@pytest.mark.parametrize("length", [256, 2048])
@pytest.mark.parametrize("method", SETTINGS)
def test_flops_of_a_training_step(method, length, checkpoint_segments):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.max_position_embeddings = 4096
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    settings = SETTINGS[method] | ({} if method == "landmark" else {"checkpoint_segments": checkpoint_segments})
    model = METHODS[method].from_backbone(backbone, **settings).train()
    ids, shape = torch.randint(0, 300, (1, length)), shape_of(backbone)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 1
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=labels).loss.backward()
    assert model.config.train_flops(shape, length) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("method", SETTINGS)
def test_numbers_are_those_of_a_state(method):
    backbone = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation="eager").eval()
    model, length = METHODS[method].from_backbone(backbone, **SETTINGS[method]).eval(), 1025
    told = sum(model.config.state_numbers(shape_of(backbone), length))
    state = model.read(torch.randint(0, 300, (1, length)))
    if method == "landmark":
        level = state.blocks.levels[0][0]
        filled = int(level.filled.max())
        kept = sum(t[:, :, :filled].numel() for table in (level.keys, level.values) for t in table)
        kept += sum(t.numel() for tail in state.tails for t in tail or ())
    else:
        kept = sum(
            t.numel() for name, t in state.tensors().items() if name.startswith("memory") and t.is_floating_point()
        )
    assert told == pytest.approx(kept, rel=0.01)


def test_published_ratios():
    """×295 for OPT-125M and ×29 for OPT-175B (Bulatov et al. 2023, 2304.11062, §3): at 2,048,000 tokens in segments of 512, without the few
    positions of the memory, with the logits of every token.
    """
    for width, layers, heads, published in ((768, 12, 12, 295), (12288, 96, 96, 29)):
        config = OPTConfig(
            vocab_size=50272, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            word_embed_proj_dim=width,
        )  # fmt: skip
        shape = shape_of(build_empty(config))
        rmt = RmtConfig(backbone_config=config, num_memory_tokens=0, segment_length=512)
        length = 2_048_000
        every = 2 * length * shape.head
        ratio = (shape.run(length) + every) / (rmt.read_flops(shape, length) + every)
        assert ratio == pytest.approx(published, rel=0.04)


def test_experts_are_refused():
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    )
    with pytest.raises(UsageError, match="--model: MixtralForCausalLM is no decoder whose cost is known"):
        check_known(build_empty(config), "--model")
