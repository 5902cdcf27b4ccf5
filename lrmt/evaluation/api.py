"""A model behind an OpenAI-compatible chat endpoint, as a baseline: asked greedily, at most `concurrency` prompts at once."""

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lrmt.errors import UsageError, one_line
from lrmt.evaluation.babilong.prompts import NEW_TOKENS

CHARACTERS_PER_TOKEN = 4  # of English, in the tokenizers of today
LONGEST_BACKOFF = 8  # seconds that the client waits between two tries, unless the server asks for more
PATIENCE = 3  # prompts, at least, that fail in a row before an endpoint is given up
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


class Endpoint:
    """`answer` and `estimate_cost` for one model.

    Args:
        model: its name at the endpoint.
        base_url, api_key: of the endpoint; by default those of the environment, OPENAI_BASE_URL and OPENAI_API_KEY.
        concurrency: prompts in flight. timeout: seconds to wait for one answer.
        max_retries: tries after the first, for 408, 409, 429, 5xx, a timeout or a lost connection, after 0.5, 1, 2, … 8
            seconds, or as long as Retry-After says (at most two minutes).

    `failure` tells, in one line, what the first prompt of the last `ask` that failed did so of; None if all were answered.
    When as many prompts as are in flight (PATIENCE at least) failed in a row the endpoint is given up: nothing is asked any more.
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
        self._failed_in_a_row, self._reason = 0, None
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
        asyncio.run(self._ask_all(enumerate(prompts), max_new_tokens, note))

    @property
    def given_up(self) -> bool:
        return self._failed_in_a_row >= max(self.concurrency, PATIENCE)

    async def _ask_all(self, prompts, max_new_tokens, note):
        from openai import AsyncOpenAI

        async def work():
            while not self.given_up and (numbered := next(prompts, None)):
                text = await self._ask(client, numbered[1], max_new_tokens)
                if text is not None:
                    self._failed_in_a_row = 0
                    note(numbered[0], text)

        async with AsyncOpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=self.timeout, max_retries=self.max_retries
        ) as client:
            await asyncio.gather(*(work() for _ in range(self.concurrency)))

    def _fail(self, reason: str, of_the_prompt: bool = False) -> None:
        self._reason = reason
        self.failure = self.failure or reason
        self._failed_in_a_row += not of_the_prompt

    async def _ask(self, client, prompt, max_new_tokens) -> str | None:
        from openai import OpenAIError

        request = client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=max_new_tokens,
        )
        # the client's timeout starts again with each byte: a server that drips would never reach it
        deadline = (self.max_retries + 1) * (self.timeout + LONGEST_BACKOFF)
        try:
            reply = await asyncio.wait_for(request, deadline)
            text = reply.choices[0].message.content
            if isinstance(text, str):
                return text
            self._fail(f"an answer without text (finish_reason {reply.choices[0].finish_reason!r})")
        except asyncio.TimeoutError:  # noqa: UP041, one and the same only from Python 3.11 on
            self._fail(f"no whole answer within {deadline:.0f} seconds")
        except OpenAIError as error:
            self._fail(one_line(error), getattr(error, "status_code", None) in OF_THE_PROMPT)
        except (AttributeError, IndexError, TypeError, ValueError):
            self._fail("an answer that is no chat completion")
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
