"""What several tests share: random backbones with the shipped tokenizer, and recipes run inside the test's process."""

import os
import runpy
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they bring, and change sums

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": None,
}  # fmt: skip
SMALL = ["--config", str(ROOT / "tests" / "small.yaml")]
FP32 = ["--load_in_4bit", "false", "--dtype", "float32", "--bf16", "false"]


def _configs(vocab_size: int, eos_token_id: int) -> dict:
    shape = SHAPE | {"vocab_size": vocab_size, "eos_token_id": eos_token_id}
    return {
        "llama": LlamaConfig(**shape),
        "llama-tied": LlamaConfig(**shape, tie_word_embeddings=True),
        "mistral": MistralConfig(**shape, sliding_window=None),
        "qwen2": Qwen2Config(**shape),
        "gpt2": GPT2Config(
            vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            eos_token_id=eos_token_id, bos_token_id=None,
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> dict[str, Path]:
    """Folders of random backbones by architecture, each with the tokenizer that ships with lrmt."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "lrmt" / "assets" / "tiny-llama")
    folders = {}
    for name, config in _configs(len(tokenizer), tokenizer.eos_token_id).items():
        folders[name] = tmp_path_factory.mktemp("backbones") / name
        torch.manual_seed(0)
        backbone = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # the default initialisation is near zero: let every layer matter
            for parameter in backbone.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        backbone.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def call_of():
    """`call_of("rmt_llama")`: what the recipe hands to `run_recipe`, as `(arguments, named arguments)`."""
    from lrmt.training import recipe as module

    def call(recipe: str):
        seen, real = [], module.run_recipe
        module.run_recipe = lambda *given, **named: seen.append((given, named))
        try:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        finally:
            module.run_recipe = real
        (only,) = seen
        return only

    return call


@pytest.fixture(scope="session")
def run_recipe(call_of):
    """`run_recipe("rmt_llama", *flags)`: the recipe with this command line, whose mistakes are raised."""
    from lrmt.training.recipe import parse_recipe
    from lrmt.training.run import train

    def run(recipe: str, *flags):
        given, named = call_of(recipe)
        return train(*parse_recipe(*given, **named, args=list(map(str, flags))))

    return run


@pytest.fixture(scope="session")
def train_small(backbones, tmp_path_factory):
    """`train_small(*flags)`: trains a random LLaMA, unless flags say otherwise, and returns the trainer."""
    from lrmt.training.recipe import parse_recipe
    from lrmt.training.run import train

    def run(*flags):
        flags = [
            "--model_name_or_path",
            backbones["llama"],
            "--output_dir",
            tmp_path_factory.mktemp("runs") / "run",
            *SMALL,
            *flags,
        ]
        config = ROOT / "recipes" / "configs" / "rmt_tiny_llama.yaml"
        return train(*parse_recipe("rmt", default_config=config, args=list(map(str, flags))))

    return run


@pytest.fixture(scope="session")
def small_flags() -> list[str]:
    return list(SMALL)


@pytest.fixture(scope="session")
def fp32_flags() -> list[str]:
    return list(FP32)


@pytest.fixture(scope="session")
def trained(train_small):
    """A short NF4 run with everything an adapter folder holds: `(trainer, folder)`."""
    trainer = train_small("--save_steps", "3", "--learning_rate", "1e-2")
    return trainer, Path(trainer.args.output_dir)


@pytest.fixture(scope="session")
def data_dir():
    folder = Path(os.environ.get("LRMT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder}; set LRMT_DATA")
    return folder
