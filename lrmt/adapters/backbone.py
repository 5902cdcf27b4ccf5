"""The backbone under an adapter: its config, tokenizer and weights opened, identified, and its quirks in 4 bits."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lrmt.adapters.find import FLAG, check_files, find_backbone, is_named, resolve_backbone
from lrmt.adapters.gguf import is_gguf
from lrmt.errors import UsageError, one_line
from lrmt.models.config import LongContextConfig
from lrmt.models.weights import gathered, layers_of
from lrmt.ranks import this_rank


def read_backbone_config(
    name: str, *, revision: str | None = None, attn_implementation: str | None = None, flag: str = FLAG
) -> PreTrainedConfig:
    """The backbone's config, after a look at all that can be refused without reading its weights.

    Raises:
        UsageError: nothing there, weights that are missing or cut off, quantised otherwise than to 4 bits by bitsandbytes, no
            decoder that transformers can build, or attention that cannot be used here.
    """
    config = _open(AutoConfig.from_pretrained, name, flag, revision=revision)
    if isinstance(config, LongContextConfig):
        raise UsageError(f"{flag} {name} is a {config.model_type} model already; name the backbone that it was made of")
    if quantization_of(config) is None and getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "something else")
        raise UsageError(
            f"{flag} {name} is quantised with {method}, not to 4 bits by bitsandbytes; name the full weights, which "
            "`--load_in_4bit` quantises"
        )
    _open(AutoConfig.from_pretrained, name, flag, build_empty, revision=revision)
    if attn_implementation is not None:
        told = f"`--attn_implementation` {attn_implementation} (leave it out for the default) with {flag}"
        _open(
            AutoConfig.from_pretrained,
            name,
            told,
            build_empty,
            revision=revision,
            attn_implementation=attn_implementation,
        )
    return config


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The decoder of this config on the meta device: layers and shapes, no weights."""
    with torch.device(
        "meta"
    ):  # the class itself: `from_config` would shard under ZeRO-3, and there is nothing to shard
        backbone = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    backbone.tie_weights()  # moving to the meta device had parted them
    return backbone


def load_tokenizer(name: str, revision: str | None = None, flag: str = FLAG, backbone: str | None = None):
    """The tokenizer of a backbone, or of an adapter's folder: it ends answers, and pads with what the model has an embedding of.

    `backbone`: as `open_tokenizer` takes it.
    """
    config = _open(AutoConfig.from_pretrained, name, flag, weights=False, revision=revision)
    tokenizer = open_tokenizer(name, revision, flag, backbone)
    rows = config.get_text_config().vocab_size
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
        problem = "is not set" if tokenizer.eos_token_id is None else f"({tokenizer.eos_token}) has no embedding"
        raise UsageError(
            f"{flag} {name}: its tokenizer's end-of-sequence token, which answers end in, {problem}; set `eos_token` in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_tokenizer(name: str, revision: str | None = None, flag: str = "--tokenizer", backbone: str | None = None):
    """The tokenizer of a folder, a Hub id, a GGUF or a named backbone, as it is; of an adapter without one that of its backbone,
    which is looked for where training found it, or is at the place `backbone`.
    """
    name = str(name)
    adapter, config = Path(name, "adapter_config.json"), Path(name, "config.json")
    if adapter.is_file() and not Path(name, "tokenizer_config.json").is_file():
        told = [json.loads(file.read_text(encoding="utf-8")) for file in (adapter, config) if file.is_file()]
        place = (
            resolve_backbone(backbone)
            if backbone
            else find_backbone(Path(name), told[0].get("base_model_name_or_path"))
        )
        return open_tokenizer(
            place, told[-1].get("backbone_revision"), FLAG if backbone else f"{flag} {name}: its backbone"
        )
    place = resolve_backbone(name, flag) if is_named(name) or is_gguf(name) else name
    check_files(place, flag, weights=False)
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision)
    except Exception as error:
        raise UsageError(
            f"{flag} {name}: its tokenizer cannot be loaded ({one_line(error)}); name a folder or a Hub id that has one"
        ) from None


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    device_map: dict | str | None = None,
    flag: str = FLAG,
) -> PreTrainedModel:
    """Loads a frozen decoder (`trust_remote_code` stays off). Raises `UsageError` if it cannot be loaded.

    Args:
        quantization_config: to 4 bits; a checkpoint that is in 4 bits already stays as it is. None: full weights, from such a
            checkpoint the values that its 4 bits stand for.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = read_backbone_config(name, revision=revision, attn_implementation=attn_implementation, flag=flag)
    packed = quantization_of(config)
    if packed is not None:
        config.quantization_config = packed | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    backbone, loaded = _open(
        AutoModelForCausalLM.from_pretrained,
        name,
        flag,
        config=config,
        revision=revision,
        dtype=dtype,
        quantization_config=None if packed is not None else quantization_config,
        attn_implementation=attn_implementation,
        device_map=device_map,
        output_loading_info=True,
    )
    check_complete(loaded, f"{flag} {name}")
    if packed is not None:
        if any(getattr(layer.weight, "quant_state", None) is None for _, layer in layers_in_4bit(backbone)):
            raise UsageError(
                f"{flag} {name}: config.json speaks of 4 bits, the weights are full; take quantization_config out of it"
            )
        if quantization_config is None:
            dequantise_(backbone, dtype)
        for parameter in backbone.parameters():  # of such a checkpoint transformers leaves them as they are in the file
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.data = parameter.data.to(dtype)
    if packed is not None or quantization_config is not None:
        keep_4bit_trainable(backbone)
    backbone.config.use_cache = False
    return backbone.requires_grad_(False)


def _open(loader, name: str, flag: str, then=None, weights: bool = True, **kwargs):
    """`loader`, and then `then`, on a backbone; whatever they raise is one line."""
    place = resolve_backbone(name, flag)
    check_files(place, flag, weights)
    try:
        opened = loader(place, **kwargs)
        return opened if then is None else then(opened)
    except Exception as error:
        problem = (
            one_line(error)
            if isinstance(error, (OSError, ValueError))
            else f"{type(error).__name__}: {one_line(error)}"
        )
        if not Path(place).exists():  # a Hub id, or a folder of the same spelling
            remedy = "" if flag == FLAG else f"; say where it is with {FLAG}"
            problem = f"no such folder, and as a Hub id: {problem}{remedy}"
        raise UsageError(f"{flag} {name} cannot be loaded: {problem}") from None


def check_complete(loaded: dict, told: str) -> None:
    """Raises `UsageError` where weights are missing, which transformers draws at random."""
    if missing := sorted(loaded["missing_keys"]):
        raise UsageError(
            f"{told}: its weights lack {missing[0]}, and {len(missing) - 1} more that its config.json asks for; copy or "
            "download both again"
        )


def backbone_fingerprint(backbone: PreTrainedModel) -> str:
    """Identifies a backbone by its shape and the start of its token embeddings, which quantisation leaves alone."""
    config = backbone.config
    shape = [config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size]
    embeddings = backbone.get_input_embeddings().weight
    with gathered(embeddings):
        rows = embeddings[:16].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(json.dumps(shape).encode() + rows.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------- 4 bits


def quantization_of(config: PreTrainedConfig) -> dict | None:
    """The settings of a checkpoint that bitsandbytes has brought to 4 bits already; None for any other."""
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict | None) else settings.to_dict()
    ours = settings and settings.get("quant_method") == "bitsandbytes" and settings.get("load_in_4bit")
    return settings if ours else None


def layers_in_4bit(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The 4-bit layers of a model, by name."""
    from bitsandbytes.nn import Linear4bit  # imports torch's compiler, which full weights have no need of

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def keep_4bit_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit layers, which it does on CPUs with bf16 instructions when a layer first runs in eval
    mode: the repacked layer has no gradient, so that training would go on with silently wrong ones, computes in bf16 whatever was
    asked for, and takes three times as long to read a segment, though half as long for a single token.
    """
    for _, module in layers_in_4bit(model):
        module.support_avx512bf16_for_cpu = False


def copy_dequantised_(backbone: nn.Module, packed: nn.Module) -> None:
    """Gives `backbone` the weights that its 4-bit twin `packed` computes with, in place."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in layers_in_4bit(packed):
        values = dequantize_4bit(module.weight.data, module.weight.quant_state)
        target = backbone.get_submodule(name)
        target.weight.data = (values.T if isinstance(target, Conv1D) else values).to(target.weight).contiguous()


def computes_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16; True also where that cannot be told."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    able = [can for name, can in tell().items() if name in ("avx512_bf16", "amx_bf16")]
    return any(able) or not able


def dequantise_(backbone: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts full layers in place of 4-bit ones, with the values that these compute with."""
    config = copy.deepcopy(backbone.config)
    del config.quantization_config
    full = build_empty(config)  # its layers are of the kinds that the architecture has
    for name, module in layers_in_4bit(backbone):
        layer = full.get_submodule(name).to_empty(device=module.weight.device).to(dtype)
        if module.bias is not None:
            layer.bias.data = module.bias.data.to(dtype)
    copy_dequantised_(full, backbone)
    for name, _ in layers_in_4bit(backbone):
        backbone.set_submodule(name, full.get_submodule(name))
    backbone.hf_quantizer.remove_quantization_config(backbone)


def check_compilable(model_class: type) -> None:
    if not model_class.can_compile:
        raise UsageError(
            f"`--compile_layers`: the attention of a {model_class.config_class.model_type} model changes from call to call; leave it out"
        )


def compile_layers(model: nn.Module, **options) -> None:
    """Compiles each layer of the backbone in place: what differs between layers are tensors, so they share what is compiled. Where
    torch.compile does not work, which is told in a line, they stay as they are. `options` are torch.compile's.

    Raises `UsageError` for a method that cannot be compiled.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    check_compilable(type(base))
    place = {"device": base.device, "dtype": base.dtype}
    probe = nn.Linear(8, 8, **place)
    try:
        torch.compile(probe.forward, **options)(torch.ones(2, 8, **place)).sum().backward()
    except Exception as error:  # of whatever compiler it is
        if this_rank().is_main_process:
            print(
                f"`--compile_layers`: torch.compile does not work here, layers are run as they are ({one_line(error)})"
            )
        return
    for layer in layers_of(model):
        layer.compile(**options)
