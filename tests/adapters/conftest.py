"""Backbones written as GGUF files, as llama.cpp's converter does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from lrmt.tasks import prose

SPECIAL = ["<pad>", "<s>", "</s>"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def rename(name: str) -> str:
    name = name.removeprefix("model.").replace("layers.", "blk.").replace("embed_tokens", "token_embd")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}.get(name, name)


def rows_of_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs beside each other, as llama.cpp has them, from halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def folders(backbones, tmp_path_factory) -> dict[str, Path]:
    """Those of the suite, and a Qwen 3, whose heads have a size of their own."""
    folder = tmp_path_factory.mktemp("folders") / "qwen3"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=256, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return backbones | {"qwen3": folder}


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A byte-level BPE, of the kind that a GGUF can hold."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose.write(300, 0), trainer)
    return tokenizer


@pytest.fixture(scope="module")
def write_gguf(folders, byte_level):
    """`write_gguf(path, …)`: the random backbone of a folder as a GGUF, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'lrmt[gguf]'")
    kinds = gguf.GGMLQuantizationType

    def write(path, kind="F32", backbone="llama", architecture=None, tensors=None, **fields) -> Path:
        folder = folders[backbone]
        config = AutoConfig.from_pretrained(folder)
        architecture = architecture or (backbone if "qwen" in backbone else "llama")
        file = gguf.GGUFWriter(path, architecture)
        file.add_context_length(config.max_position_embeddings)
        file.add_block_count(config.num_hidden_layers)
        file.add_embedding_length(config.hidden_size)
        file.add_feed_forward_length(config.intermediate_size)
        file.add_head_count(config.num_attention_heads)
        file.add_head_count_kv(config.num_key_value_heads)
        file.add_layer_norm_rms_eps(config.rms_norm_eps)
        file.add_rope_freq_base(config.rope_parameters["rope_theta"])
        file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        for key, value in fields.items():
            key = key.replace("__", ".")
            file.add_uint16(key, value) if isinstance(value, int) else file.add_string(key, value)
        vocab = byte_level.get_vocab()
        words = sorted(vocab, key=vocab.get)
        words += [f"<unused{i}>" for i in range(len(words), config.vocab_size)]
        file.add_tokenizer_model("gpt2")
        file.add_token_list(words)
        file.add_token_types([3 if word in SPECIAL else 5 if "unused" in word else 1 for word in words])
        merges = json.loads(byte_level.to_str())["model"]["merges"]
        file.add_token_merges([" ".join(merge) for merge in merges])
        file.add_eos_token_id(config.eos_token_id)
        for name, weight in load_file(folder / "model.safetensors").items():
            weight = weight.to(torch.bfloat16).float().numpy()  # which every kind but Q8_0 holds, and the folder
            if architecture == "llama" and "q_proj" in name:
                weight = rows_of_llama_cpp(weight, config.num_attention_heads)
            if architecture == "llama" and "k_proj" in name:
                weight = rows_of_llama_cpp(weight, config.num_key_value_heads)
            as_kind = kinds.F32 if weight.ndim == 1 else kinds[kind]
            file.add_tensor(rename(name), gguf.quants.quantize(weight, as_kind), raw_dtype=as_kind)
        for name, weight in (tensors or {}).items():
            file.add_tensor(name, weight.astype(np.float32))
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        return Path(path)

    return write
