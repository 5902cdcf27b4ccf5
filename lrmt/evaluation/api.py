"""A model behind an OpenAI-compatible chat endpoint, as a baseline: asked greedily, at most `concurrency` prompts at once."""

import asyncio
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lrmt.errors import UsageError, one_line
from lrmt.evaluation.babilong.prompts import NEW_TOKENS

CHARACTERS_PER_TOKEN = 4  # of English, in the tokenizers of today
LONGEST_BACKOFF = 8  # seconds that the client waits between two tries, unless the server asks for more
PATIENCE = 3  # prompts, at least, that fail in a row before an endpoint is given up
NO_ANSWER = ("content_filter", "tool_calls", "function_call")  # as a reason to end, whatever was said before
_THOUGHTS = r"(?:think(?:ing)?|thoughts?|reasoning|seed:think)"
THOUGHT = re.compile(rf"<\s*{_THOUGHTS}\b[^>]*>|\[THINK\]|<\|channel\|>analysis", re.IGNORECASE)
THOUGHT_ENDS = re.compile(rf"<\s*/\s*{_THOUGHTS}\s*>|\[/THINK\]", re.IGNORECASE)
OF_THE_PROMPT = (400, 413, 422)  # refusals that tell nothing about other prompts: it is too long, say


@dataclass(frozen=True)
class Cost:
    """What an evaluation would ask of an endpoint; `price` in the currency of the prices given, None without them."""

    requests: int
    input_tokens: int
    output_tokens: int
    price: float | None = None

    def __str__(self):
        price = "" if self.price is None else f", about {self.price:,.2f} at the prices given"
        return f"{self.requests:,} requests, about {self.input_tokens:,} tokens in and at most {self.output_tokens:,} out{price}"


@dataclass(frozen=True)
class Form:
    """How an endpoint wants to be asked: what it calls the tokens that may be said, and whether it takes a temperature."""

    limit: str = "max_tokens"
    temperature: bool = True

    def arguments(self, max_new_tokens: int) -> dict:
        return {self.limit: max_new_tokens} | ({"temperature": 0} if self.temperature else {})

    def other(self, error) -> "Form | None":
        """The form that a refusal (openai.BadRequestError) of this one asks for; None if it refuses something else."""
        names_limit = error.param == "max_tokens" or "use 'max_completion_tokens'" in str(error).lower()
        if names_limit and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        if (names_limit or error.param == "temperature") and self.temperature:
            return replace(self, temperature=False)
        return None


class Endpoint:
    """`answer` and `estimate_cost` for one model.

    Args:
        model: its name at the endpoint.
        base_url, api_key: of the endpoint; by default those of the environment, OPENAI_BASE_URL and OPENAI_API_KEY.
        concurrency: prompts in flight. timeout: seconds to wait for one answer.
        max_retries: tries after the first, for 408, 409, 429, 5xx, a timeout or a lost connection, after 0.5, 1, 2, … 8
            seconds, or as long as Retry-After says (at most two minutes).

    `failure` tells, in one line, what the first prompt of the last `ask` that failed did so of; None if all were answered.
    An answer that was cut before anything was said, or within its thoughts, failed; finished thoughts are no part of one.
    When as many prompts as are in flight (PATIENCE at least) failed in a row the endpoint is given up: nothing is asked any more.
    `form`: as it was asked last with success.
    Raises UsageError where there is no client, key or address.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
    ):
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UsageError('an API baseline needs the package openai; pip install "lrmt[api]"') from None
        self.model, self.concurrency, self.timeout, self.max_retries = model, concurrency, timeout, max_retries
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self.api_key = api_key or os.environ.get("OPENAI_API_KEY")
        self.failure: str | None = None
        self.form = Form()
        self._failed_in_a_row, self._reason, self._failed_first = 0, None, math.inf
        if not self.api_key:
            raise UsageError("OPENAI_API_KEY is not set; export it (any word will do for a server that asks for none)")
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"OPENAI_BASE_URL must begin with http:// or https://; got {self.base_url}")
        for name, value, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            if value < least:
                raise UsageError(f"--{name} must be at least {least}; got {value}")
        if timeout <= 0:
            raise UsageError(f"--timeout must be more than 0 seconds; got {timeout}")

    def answer(self, prompts: list[str], max_new_tokens: int = NEW_TOKENS) -> list[str | None]:
        """The answers in the order of the prompts; None for one that failed after all tries, or was not asked."""
        answers = [None] * len(prompts)
        self.ask(prompts, max_new_tokens, answers.__setitem__)
        return answers

    def ask(self, prompts: Iterable[str], max_new_tokens: int, note: Callable[[int, str], None]) -> None:
        """Calls `note(number of the prompt, answer)` for each answer as it comes; prompts are taken as they can be asked."""
        self.failure = f"not asked: the endpoint was given up ({self._reason})" if self.given_up else None
        self._failed_first = math.inf
        asyncio.run(self._ask_all(enumerate(prompts), max_new_tokens, note))

    @property
    def given_up(self) -> bool:
        return self._failed_in_a_row >= max(self.concurrency, PATIENCE)

    async def _ask_all(self, prompts, max_new_tokens, note):
        from openai import AsyncOpenAI

        async def work():
            while not self.given_up and (numbered := next(prompts, None)):
                text = await self._ask(client, *numbered, max_new_tokens)
                if text is not None:
                    self._failed_in_a_row = 0
                    note(numbered[0], text)

        async with AsyncOpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=self.timeout, max_retries=self.max_retries
        ) as client:
            await asyncio.gather(*(work() for _ in range(self.concurrency)))

    def _fail(self, number: int, reason: str, of_the_prompt: bool = False) -> None:
        self._reason = reason
        if number < self._failed_first:  # of several in flight a later one may fail sooner
            self._failed_first, self.failure = number, reason
        self._failed_in_a_row += not of_the_prompt

    async def _ask(self, client, number, prompt, max_new_tokens) -> str | None:
        from openai import OpenAIError

        # the client's timeout starts again with each byte: a server that drips would never reach it
        deadline = (self.max_retries + 1) * (self.timeout + LONGEST_BACKOFF)
        try:
            reply = await asyncio.wait_for(self._complete(client, prompt, max_new_tokens), deadline)
            (choice, *_) = reply.choices
            return self._read(number, choice.message.content, choice.finish_reason, max_new_tokens)
        except asyncio.TimeoutError:  # noqa: UP041, one and the same only from Python 3.11 on
            self._fail(number, f"no whole answer within {deadline:.0f} seconds")
        except OpenAIError as error:
            self._fail(number, one_line(error), getattr(error, "status_code", None) in OF_THE_PROMPT)
        except (AttributeError, IndexError, TypeError, ValueError):
            self._fail(number, "an answer that is no chat completion")
        return None

    async def _complete(self, client, prompt, max_new_tokens):
        """The endpoint's reply, in the form that it takes."""
        from openai import BadRequestError

        form = self.form
        while True:
            try:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    **form.arguments(max_new_tokens),
                )
            except BadRequestError as error:
                form = form.other(error)
                if form is None:
                    raise
            else:
                self.form = form
                return reply

    def _read(self, number, text, finish_reason, max_new_tokens) -> str | None:
        """What is said behind finished thoughts; None, and a failure, where nothing is or where the thoughts have no end."""
        said = strip_thoughts(text) if isinstance(text, str) else ""
        thinking = THOUGHT.search(said) is not None
        if finish_reason == "length" and (thinking or not said.strip()):
            remedy = "a model that thinks before it answers needs more: raise --api_max_tokens"
            self._fail(number, f"an answer cut after {max_new_tokens} tokens, before anything was said; {remedy}")
        elif thinking:
            self._fail(number, f"an answer that ends within its thoughts (finish_reason {finish_reason!r})")
        elif not said.strip() or finish_reason in NO_ANSWER:
            self._fail(number, f"an answer without text (finish_reason {finish_reason!r})")
        else:
            return said.encode("utf-8", "replace").decode()  # JSON may hold halves of characters, which no file takes
        return None

    def estimate_cost(
        self,
        prompts: Iterable[tuple[str, int, int]],
        input_price: float | None = None,
        output_price: float | None = None,
    ) -> Cost:
        """What asking would take, before anything is asked.

        Args:
            prompts: a typical prompt of each cell, how many like it will be asked, and `max_new_tokens` of each.
            input_price, output_price: of a million tokens.
        """
        prompts = list(prompts)
        requests = sum(count for _, count, _ in prompts)
        tokens_in = sum(count * -(-len(prompt) // CHARACTERS_PER_TOKEN) for prompt, count, _ in prompts)
        tokens_out = sum(count * new_tokens for _, count, new_tokens in prompts)
        price = None
        if input_price is not None or output_price is not None:
            price = (tokens_in * (input_price or 0) + tokens_out * (output_price or 0)) / 1e6
        return Cost(requests, tokens_in, tokens_out, price)


def strip_thoughts(text: str) -> str:
    """The text without finished thoughts, `<think>…</think>` and their like; some endpoints keep the opening tag back."""
    text = text.rpartition("<|channel|>final<|message|>")[2]
    ends = [end.end() for end in THOUGHT_ENDS.finditer(text)]
    return text[ends[-1] :].lstrip() if ends else text
