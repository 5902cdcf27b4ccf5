"""Who answers: the trained model, the untrained memory, and the backbone alone, in several ways."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lrmt.evaluation.api import Endpoint
from lrmt.evaluation.prompts import build_prompt
from lrmt.evaluation.rag import Retriever, bm25, context_ids, embedding_ranker
from lrmt.evaluation.settings import DEFAULT_BASELINES
from lrmt.evaluation.streaming import StreamedBackbone
from lrmt.tasks.base import Example, Pieces


@dataclass(frozen=True)
class Contender:
    """One column of the table.

    `generate(input_ids [B, T], attention_mask [B, T], **generation arguments)` returns [B, T + new].
    `loss(input_ids [B, T], count)` returns [B], fp32: the mean negative log-likelihood of the last `count` tokens, < T.
    `window`: how many tokens of the END of a prompt it sees; None sees all. `show(example)` gives other ids than its prompt.
    """

    name: str
    generate: Callable[..., torch.Tensor] | None = None
    loss: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    window: int | None = None
    show: Callable[[Example], np.ndarray] | None = None

    def answer(self, examples: list[Example], tokenizer, max_new_tokens: int, device="cpu") -> list[str | None]:
        prompts = [self.show(example) if self.show else example.prompt_ids for example in examples]
        return answer(self, prompts, tokenizer, max_new_tokens, device)

    def failure(self) -> str | None:
        """Why an answer is None."""


class EndpointContender:
    """A column answered by an `api.Endpoint`, under the name of its model, with a prompt for instruction-tuned models."""

    def __init__(self, endpoint: Endpoint, tokenizer):
        self.name, self.endpoint, self.tokenizer = endpoint.model, endpoint, tokenizer
        self.pieces = Pieces(tokenizer)

    def prompt(self, example: Example) -> str:
        context = self.tokenizer.decode(context_ids(example, self.pieces), skip_special_tokens=True)
        return build_prompt(example.task, context, example.question)

    def answer(self, examples, tokenizer, max_new_tokens, device="cpu"):
        return self.endpoint.answer([self.prompt(example) for example in examples], max(max_new_tokens, 20))

    def failure(self):
        return self.endpoint.failure


def build_contenders(
    model, names=DEFAULT_BASELINES, *, tokenizer=None, rag: dict | None = None, max_new_tokens: int = 20
) -> list[Contender]:
    """The columns that `model` allows: itself under its model type, then those of BASELINES that are named but "api".

    A merged model holds no backbone to compare with and gives the first alone. Baseline "rag" needs the `tokenizer`, takes
    the options of `Retriever` and `model` (whose embeddings rank; None: BM25), and leaves room for `max_new_tokens`.
    Raises UsageError for a backbone that a baseline cannot run on.
    """

    def loss(input_ids, count):
        labels = input_ids.clone()
        labels[:, :-count] = -100
        return row_losses(model(input_ids=input_ids, labels=labels).logits, input_ids[:, -count:])

    trained = Contender(model.config.model_type, model.generate, loss)
    if not hasattr(model, "disable_adapter"):
        return [trained]
    backbone, length = model.get_base_model().backbone, model.config.segment_length

    def backbone_loss(input_ids, count):
        logits = backbone(input_ids=input_ids, logits_to_keep=count + 1, use_cache=False).logits
        return row_losses(logits[:, -count - 1 : -1].flatten(0, 1), input_ids[:, -count:])

    def without_adapter(function):
        def call(*arguments, **named):
            with model.disable_adapter():
                return function(*arguments, **named)

        return call

    def streamed(name, recurrence):
        return Contender(name, without_adapter(StreamedBackbone(backbone, length, recurrence).generate))

    def retrieving():
        options = dict(rag or {})
        ranker = options.pop("model", None)
        rank = embedding_ranker(ranker, str(model.device)) if ranker else bm25
        show = Retriever(tokenizer, length - max_new_tokens, rank=rank, **options)
        return Contender("rag", without_adapter(backbone.generate), show=show)

    build = {
        "untrained": lambda: Contender("untrained", without_adapter(model.generate), without_adapter(loss)),
        "backbone": lambda: Contender(
            "backbone", without_adapter(backbone.generate), without_adapter(backbone_loss), window=length
        ),
        "full": lambda: Contender("full", without_adapter(backbone.generate)),
        "sliding_window": lambda: streamed("sliding_window", "window"),
        "xl": lambda: streamed("xl", "segment"),
        "rag": retrieving,
    }
    return [trained, *(build[name]() for name in names if name in build)]


def build_endpoint_contender(settings, tokenizer) -> EndpointContender:
    """The column of `--baseline api`. Raises UsageError without a client, key or address."""
    endpoint = Endpoint(
        settings.api_model,
        concurrency=settings.api_concurrency,
        timeout=settings.api_timeout,
        max_retries=settings.api_max_retries,
    )
    return EndpointContender(endpoint, tokenizer)


def row_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each row, [B] fp32, from logits [B * count, V], row by row, of `targets` [B, count]."""
    losses = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


@torch.inference_mode()
def answer(contender: Contender, prompts, tokenizer, max_new_tokens: int, device="cpu") -> list[str]:
    """Greedy answers, decoded up to the end-of-sequence token, to `prompts` (a list of int arrays [P])."""
    if contender.window:
        prompts = [ids[-contender.window :] for ids in prompts]
    input_ids, attention_mask = pad_left(prompts, pad_token_id(tokenizer))
    output = contender.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id(tokenizer),
    )
    return [decode_answer(ids, tokenizer) for ids in output[:, input_ids.shape[1] :].tolist()]


def decode_answer(ids: list[int], tokenizer) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True)


def pad_left(prompts, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Int arrays [P] to input_ids and attention_mask [B, max P], both int64."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask


def pad_token_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
