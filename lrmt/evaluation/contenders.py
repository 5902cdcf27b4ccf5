"""Who answers: the trained model, the method untrained, and the backbone alone, in several ways."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lrmt.evaluation.api import Cost, Endpoint
from lrmt.evaluation.babilong.prompts import PARTS, TEMPLATE, build_prompt, prompt_parts
from lrmt.evaluation.decoding import decode_answer, generating, greedy, pad_left, pad_token_id
from lrmt.evaluation.rag import Retriever, bm25, context_ids, embedding_ranker
from lrmt.evaluation.settings import DEFAULT_BASELINES
from lrmt.models.streaming import StreamedBackbone, check_rotary
from lrmt.ranks import this_rank
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
        """The parts of a prompt (predictions.PROMPT_PARTS) that it gets, and their texts."""
        template = {"template": self.template or TEMPLATES[question_position]}
        return (), prompt_parts(task, ()) | template | ({"shown": self.shown} if self.shown else {})

    def describe_generation(self, max_new_tokens: int) -> dict:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}


class EndpointContender:
    """A column answered by an `api.Endpoint`, under the name of its model, with a prompt for instruction-tuned models.

    `max_tokens`: what it may say, thoughts included (None: as much as everybody).
    """

    def __init__(self, endpoint: Endpoint, tokenizer, max_tokens: int | None = None):
        self.name, self.endpoint, self.tokenizer, self.max_tokens = endpoint.model, endpoint, tokenizer, max_tokens
        self.pieces = Pieces(tokenizer)

    def prompt(self, example: Example) -> str:
        context = self.tokenizer.decode(context_ids(example, self.pieces), skip_special_tokens=False)
        return build_prompt(example.task, context, example.question)

    def ask(self, examples: Iterable[Example], max_new_tokens: int, note: Callable[[int, str], None]) -> str | None:
        """As `Endpoint.ask`, examples being made as they can be asked; says why one went unanswered."""
        self.endpoint.ask(map(self.prompt, examples), self.max_tokens or max_new_tokens, note)
        return self.endpoint.failure

    def describe_prompt(self, task, question_position="last"):
        return (*PARTS, "chat_template"), prompt_parts(task) | {"template": TEMPLATE}

    def describe_generation(self, max_new_tokens):
        sampling = {"temperature": 0} if self.endpoint.form.temperature else {}
        return {"max_new_tokens": self.max_tokens or max_new_tokens, **sampling}

    def estimate_cost(self, typical: list[tuple[Example, int, int]], input_price=None, output_price=None) -> Cost:
        """As `Endpoint.estimate_cost`, of an example, how many like it, and `max_new_tokens`."""
        prompts = [
            (self.prompt(example), count, self.max_tokens or new_tokens) for example, count, new_tokens in typical
        ]
        return self.endpoint.estimate_cost(prompts, input_price, output_price)


def build_contenders(model, names=DEFAULT_BASELINES, *, tokenizer=None, rag: dict | None = None) -> list[Contender]:
    """The columns that `model` allows: itself under its model type, then those of BASELINES that are named but "api".

    A merged model holds no backbone to compare with and gives the first alone. Baseline "rag" needs the `tokenizer`, and takes
    the options of `Retriever` and `model` (whose embeddings rank; None: BM25).
    Raises UsageError for a backbone that a baseline cannot run on.
    """
    trained = Contender(model.config.model_type, generating(model), measuring_loss(model))
    if not hasattr(model, "disable_adapter"):
        return [trained]
    bare = Bare(model, tokenizer, rag or {})
    return [trained, *(BUILDERS[name](bare) for name in names if name != "api")]


class Bare:
    """What baselines are made of: `model` with its adapter disabled, and its backbone."""

    def __init__(self, model, tokenizer, rag: dict):
        self.model, self.tokenizer, self.rag = model, tokenizer, rag
        self.backbone, self.segment_length = model.get_base_model().backbone, model.config.segment_length

    def without_adapter(self, function: Callable) -> Callable:
        """The function, run without the adapter."""

        def call(*arguments, **named):
            with self.model.disable_adapter():
                return function(*arguments, **named)

        return call


def build_untrained(bare: Bare) -> Contender:
    """The method without LoRA, its memory as it was drawn when the model was opened: not as training began, which may set it by notes."""
    return Contender(
        "untrained", bare.without_adapter(generating(bare.model)), bare.without_adapter(measuring_loss(bare.model))
    )


def build_backbone(bare: Bare) -> Contender:
    length, (positions, _) = bare.segment_length, read_window(bare.backbone)

    def loss(input_ids, count):
        logits = bare.backbone(input_ids=input_ids, logits_to_keep=count + 1, use_cache=False).logits
        return row_losses(logits[:, -count - 1 : -1].flatten(0, 1), input_ids[:, -count:])

    def end_of_text(example, max_new_tokens):
        room = length if positions is None else max(1, min(length, positions - max_new_tokens))
        return example.prompt_ids[-room:]

    return Contender(
        "backbone",
        bare.without_adapter(generating(bare.backbone)),
        bare.without_adapter(loss),
        window=length,
        show=end_of_text,
        shown=f"the last {length} tokens",
    )


def build_full(bare: Bare) -> Contender:
    check_rotary(bare.backbone, "leave full out")
    return Contender("full", bare.without_adapter(generating(bare.backbone)))


def build_streamed(name: str, recurrence: str) -> Callable[[Bare], Contender]:
    def build(bare):
        return Contender(
            name, bare.without_adapter(StreamedBackbone(bare.backbone, bare.segment_length, recurrence).generate)
        )

    return build


def build_rag(bare: Bare) -> Contender:
    options = dict(bare.rag)
    ranker = options.pop("model", None)
    rank = embedding_ranker(ranker, str(bare.model.device)) if ranker else bm25
    _, own_window = read_window(bare.backbone)
    show = Retriever(bare.tokenizer, own_window or bare.segment_length, rank=rank, **options)
    what = show.chunks if show.chunks == "sentences" else f"{show.chunks} tokens each"
    return Contender(
        "rag",
        bare.without_adapter(generating(bare.backbone)),
        show=show,
        template="{passages} {question}",
        shown=f"the {show.top_k} best passages ({what}) by {ranker or 'BM25'}, in order of {show.order}",
    )


#: what makes each of groups.BASELINES, but for the endpoint
BUILDERS: dict[str, Callable[[Bare], Contender]] = {
    "untrained": build_untrained,
    "backbone": build_backbone,
    "full": build_full,
    "sliding_window": build_streamed("sliding_window", "window"),
    "xl": build_streamed("xl", "segment"),
    "rag": build_rag,
}


def build_endpoint_contender(settings, tokenizer) -> EndpointContender:
    """The column of `--baseline api`. Raises UsageError without a client, key or address."""
    endpoint = Endpoint(
        settings.api_model,
        concurrency=max(1, settings.api_concurrency // this_rank().num_processes),
        timeout=settings.api_timeout,
        max_retries=settings.api_max_retries,
    )
    return EndpointContender(endpoint, tokenizer, settings.api_max_tokens)


def read_window(backbone) -> tuple[int | None, int | None]:
    """How many positions a backbone was made for, and how many of them a token sees; None where nothing says."""
    config = backbone.config.get_text_config()
    positions, window = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return positions, min(filter(None, (positions, window)), default=None)


def measuring_loss(model) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """`Contender.loss` of a memory model."""

    def loss(input_ids, count):
        labels = input_ids.clone()
        labels[:, :-count] = -100
        return row_losses(model(input_ids=input_ids, labels=labels).logits, input_ids[:, -count:])

    return loss


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
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **greedy(tokenizer, max_new_tokens)
    )
    return [decode_answer(ids, tokenizer) for ids in output[:, input_ids.shape[1] :].tolist()]
