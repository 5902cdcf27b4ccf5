"""Who answers: the trained model, the untrained memory, and the backbone alone, in several ways."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from torch.nn import functional as F

from lrmt.evaluation.api import Endpoint
from lrmt.evaluation.babilong.prompts import PARTS, TEMPLATE, build_prompt, prompt_parts
from lrmt.evaluation.rag import Retriever, bm25, context_ids, embedding_ranker
from lrmt.evaluation.settings import DEFAULT_BASELINES
from lrmt.models.streaming import StreamedBackbone, check_rotary
from lrmt.tasks.base import Example, Pieces

#: what a prompt looks like, by the place of the question
TEMPLATES = {"last": "{context} {question}", "first": "{question} {context}", "both": "{question} {context} {question}"}


@dataclass(frozen=True)
class Contender:
    """One column of the table.

    `generate(input_ids [B, T], attention_mask [B, T], **generation arguments)` returns [B, T + new].
    `loss(input_ids [B, T], count)` returns [B], fp32: the mean negative log-likelihood of the last `count` tokens, < T.
    `window`: how many tokens of the END of a prompt it sees; None sees all. `show(example, max_new_tokens)` gives other ids
    than its prompt, and `shown` says which, with their template in braces.
    """

    name: str
    generate: Callable[..., torch.Tensor] | None = None
    loss: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    window: int | None = None
    show: Callable[[Example, int], np.ndarray] | None = None
    template: str | None = None
    shown: str | None = None

    def answer(self, examples: list[Example], tokenizer, max_new_tokens: int, device="cpu") -> list[str]:
        prompts = [self.show(example, max_new_tokens) if self.show else example.prompt_ids for example in examples]
        return answer(self, prompts, tokenizer, max_new_tokens, device)

    def describe_prompt(self, task: str, question_position: str = "last") -> tuple[tuple[str, ...], dict[str, str]]:
        """The parts of a prompt (submission.PROMPT_PARTS) that it gets, and their texts."""
        template = {"template": self.template or TEMPLATES[question_position]}
        return (), prompt_parts(task, ()) | template | ({"shown": self.shown} if self.shown else {})

    def describe_generation(self, max_new_tokens: int) -> dict:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}


class EndpointContender:
    """A column answered by an `api.Endpoint`, under the name of its model, with a prompt for instruction-tuned models."""

    def __init__(self, endpoint: Endpoint, tokenizer):
        self.name, self.endpoint, self.tokenizer = endpoint.model, endpoint, tokenizer
        self.pieces = Pieces(tokenizer)

    def prompt(self, example: Example) -> str:
        context = self.tokenizer.decode(context_ids(example, self.pieces), skip_special_tokens=True)
        return build_prompt(example.task, context, example.question)

    def ask(self, examples: Iterable[Example], max_new_tokens: int, note: Callable[[int, str], None]) -> str | None:
        """As `Endpoint.ask`, examples being made as they can be asked; says why one went unanswered."""
        self.endpoint.ask(map(self.prompt, examples), max_new_tokens, note)
        return self.endpoint.failure

    def describe_prompt(self, task, question_position="last"):
        return (*PARTS, "chat_template"), prompt_parts(task) | {"template": TEMPLATE}

    def describe_generation(self, max_new_tokens):
        return {"max_new_tokens": max_new_tokens, "temperature": 0}


def build_contenders(model, names=DEFAULT_BASELINES, *, tokenizer=None, rag: dict | None = None) -> list[Contender]:
    """The columns that `model` allows: itself under its model type, then those of BASELINES that are named but "api".

    A merged model holds no backbone to compare with and gives the first alone. Baseline "rag" needs the `tokenizer`, and takes
    the options of `Retriever` and `model` (whose embeddings rank; None: BM25).
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
    positions, own_window = read_window(backbone)

    def backbone_loss(input_ids, count):
        logits = backbone(input_ids=input_ids, logits_to_keep=count + 1, use_cache=False).logits
        return row_losses(logits[:, -count - 1 : -1].flatten(0, 1), input_ids[:, -count:])

    def without_adapter(function):
        def call(*arguments, **named):
            with model.disable_adapter():
                return function(*arguments, **named)

        return call

    def end_of_text(example, max_new_tokens):
        room = length if positions is None else min(length, positions - max_new_tokens)
        return example.prompt_ids[-room:]

    def full():
        check_rotary(backbone, "leave full out")
        return Contender("full", without_adapter(backbone.generate))

    def streamed(name, recurrence):
        return Contender(name, without_adapter(StreamedBackbone(backbone, length, recurrence).generate))

    def retrieving():
        options = dict(rag or {})
        ranker = options.pop("model", None)
        rank = embedding_ranker(ranker, str(model.device)) if ranker else bm25
        show = Retriever(tokenizer, own_window or length, rank=rank, **options)
        what = show.chunks if show.chunks == "sentences" else f"{show.chunks} tokens each"
        return Contender(
            "rag",
            without_adapter(backbone.generate),
            show=show,
            template="{passages} {question}",
            shown=f"the {show.top_k} best passages ({what}) by {ranker or 'BM25'}, in order of {show.order}",
        )

    build = {
        "untrained": lambda: Contender("untrained", without_adapter(model.generate), without_adapter(loss)),
        "backbone": lambda: Contender(
            "backbone",
            without_adapter(backbone.generate),
            without_adapter(backbone_loss),
            window=length,
            show=end_of_text,
            shown=f"the last {length} tokens",
        ),
        "full": full,
        "sliding_window": lambda: streamed("sliding_window", "window"),
        "xl": lambda: streamed("xl", "segment"),
        "rag": retrieving,
    }
    return [trained, *(build[name]() for name in names if name in build)]


def build_endpoint_contender(settings, tokenizer) -> EndpointContender:
    """The column of `--baseline api`. Raises UsageError without a client, key or address."""
    endpoint = Endpoint(
        settings.api_model,
        concurrency=max(1, settings.api_concurrency // PartialState().num_processes),
        timeout=settings.api_timeout,
        max_retries=settings.api_max_retries,
    )
    return EndpointContender(endpoint, tokenizer)


def read_window(backbone) -> tuple[int | None, int | None]:
    """How many positions a backbone was made for, and how many of them a token sees; None where nothing says."""
    config = backbone.config.get_text_config()
    positions, window = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return positions, min(filter(None, (positions, window)), default=None)


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
