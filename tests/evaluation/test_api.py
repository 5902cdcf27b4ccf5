"""An endpoint that answers 429, 500, garbage, slowly, or not at all, against a server in this process (conftest.py)."""

import sys
import time

import pytest

from lrmt.errors import UsageError
from lrmt.evaluation import api
from lrmt.evaluation.api import Endpoint, strip_thoughts
from lrmt.evaluation.babilong.predictions import Predictions, build_variant, write_predictions
from lrmt.evaluation.babilong.prompts import PARTS, TEMPLATE, prompt_parts
from lrmt.evaluation.babilong.rescoring import score_folder

TIMEOUT = 1.0
TRIES = 3


def test_a_server_that_fails_in_every_way(server):
    recovers = ["ok", "429 ok", "500 503 ok", "slow ok", "hangs_up ok", "silent ok"]
    gives_up = ["silent", "500", "hangs_up", "slow slow 500"]
    at_once = ["400", "html", "half", "no_choice", "nothing", "no_text"]
    prompts = [*at_once, *recovers, *gives_up]
    endpoint = Endpoint("stub-model", concurrency=len(prompts), timeout=TIMEOUT, max_retries=TRIES - 1)
    answers = dict(zip(prompts, endpoint.answer(prompts, max_new_tokens=20), strict=True))
    assert {prompt for prompt, text in answers.items() if text is None} == {*at_once, *gives_up}
    assert {answers[prompt] for prompt in recovers} == {"the kitchen"}
    tries = {prompt: len(found) for prompt, found in server.requests.items()}
    assert tries == {
        **dict.fromkeys(at_once, 1), **{prompt: len(prompt.split()) for prompt in recovers},
        **dict.fromkeys(gives_up, TRIES),
    }  # fmt: skip

    def pauses(prompt):
        times = [when for when, _, _ in server.requests[prompt]]
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    assert pauses("429 ok")[0] >= 1.2  # what Retry-After says, where the client's own pause were half a second
    first, second = pauses("500")
    assert 0.3 < first < second

    _, body, headers = server.requests["ok"][0]
    assert body == {
        "model": "stub-model", "messages": [{"role": "user", "content": "ok"}], "temperature": 0, "max_tokens": 20,
    }  # fmt: skip
    assert headers["Authorization"] == "Bearer a-key"


def test_a_run_goes_on_after_a_failure(server):
    endpoint = Endpoint("stub", timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(["401"]) == [None]
    assert "refused with 401" in endpoint.failure
    assert endpoint.answer(["401", "ok", "html"]) == [None, "the kitchen", None]
    assert "refused with 401" in endpoint.failure  # the first
    assert endpoint.answer(["silent", "html"]) == [None, None]
    assert "no chat completion" not in endpoint.failure  # the first of the prompts, though it fails last
    assert endpoint.answer(["html"]) == [None]
    assert "no chat completion" in endpoint.failure
    assert endpoint.answer(["no_text"]) == [None]
    assert "without text" in endpoint.failure
    assert endpoint.answer(["ok", "ok"]) == ["the kitchen"] * 2
    assert endpoint.failure is None
    assert endpoint.answer([]) == []


def test_answers_keep_their_order_and_few_are_in_flight(server):
    prompts = ["ok", "slow", "500 ok", *(f"{'ok ' * n}ok" for n in range(1, 9))]
    endpoint = Endpoint("stub", concurrency=3, timeout=5, max_retries=1)
    answers = endpoint.answer(prompts)
    assert answers == ["the kitchen", "too late", *["the kitchen"] * 9]
    assert server.most_in_flight == 3


def test_a_dead_endpoint_is_not_asked_everything(server):
    endpoint = Endpoint("stub", concurrency=2, timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer([f"{'500 ' * n}500" for n in range(10)]) == [None] * 10
    assert len(server.requests) in (3, 4)  # the third fails while a fourth is on its way
    assert "refused with 500" in endpoint.failure
    server.requests.clear()
    assert endpoint.answer(["ok"] * 5) == [None] * 5 and not server.requests  # nor later
    assert endpoint.failure.startswith("not asked: the endpoint was given up (") and "500" in endpoint.failure


def test_one_that_answers_others_is_asked_everything(server):
    """What is wrong with a prompt, that it is too long, say, tells nothing about others; nor does a failure now and then."""
    endpoint = Endpoint("stub", concurrency=1, timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(["400"] * 10) == [None] * 10
    prompts = ["500", "503", "ok", "500 500", "503 503", "ok"]
    assert endpoint.answer(prompts) == [None, None, "the kitchen", None, None, "the kitchen"]


@pytest.mark.parametrize("kind", ["thinks", "keeps_thoughts_back"])
def test_an_answer_cut_before_anything_is_said_failed(server, kind):
    endpoint = Endpoint("stub", timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer([kind], 20) == [None]
    assert "cut after 20 tokens, before anything was said" in endpoint.failure
    assert "raise --api_max_tokens" in endpoint.failure
    assert endpoint.answer([kind], 100) == ["the kitchen"]  # without its thoughts
    assert endpoint.answer(["cut"], 20) == ["the kitchen"]  # what was said counts


def test_a_model_whose_thoughts_are_always_cut_is_given_up(server):
    endpoint = Endpoint("stub", concurrency=1, timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(["thinks " * n for n in range(1, 9)], 5) == [None] * 8
    assert len(server.requests) == api.PATIENCE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bathroom", "bathroom"),
        (" the\n bathroom ", " the\n bathroom "),
        ("<think>kitchen? no.\n\nno.</think>\n\nbathroom", "bathroom"),
        ("<think></think>bathroom", "bathroom"),
        ("kitchen? no.</think>\nbathroom", "bathroom"),  # where the prompt's template opens the thoughts
        ("<think>a</think><think>b</think>bathroom", "bathroom"),
        ("<think>kitchen? no", "<think>kitchen? no"),
        ("<Thinking>kitchen? no.</Thinking> bathroom", "bathroom"),
        ("[THINK]kitchen[/THINK]bathroom", "bathroom"),
        ("<seed:think>kitchen</seed:think >bathroom", "bathroom"),
        ("<|channel|>analysis<|message|>kitchen<|end|><|channel|>final<|message|>bathroom", "bathroom"),
    ],
)
def test_finished_thoughts_are_no_part_of_an_answer(text, said):
    assert strip_thoughts(text) == said


def test_half_a_character_is_no_text(server):
    server.answer = lambda prompt: "the \ud83d café"
    assert Endpoint("stub", timeout=TIMEOUT).answer(["ok"]) == ["the ? café"]


def test_an_endpoint_that_wants_other_names_is_asked_by_them(server):
    endpoint = Endpoint("stub", concurrency=1, timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(["new_names", "new_names "], 20) == ["the kitchen"] * 2
    bodies = [body for found in server.requests.values() for _, body, _ in found]
    asked = [{key: body[key] for key in body if key not in ("model", "messages")} for body in bodies]
    assert asked == [
        {"temperature": 0, "max_tokens": 20}, {"temperature": 0, "max_completion_tokens": 20},
        {"max_completion_tokens": 20}, {"max_completion_tokens": 20},
    ]  # fmt: skip


def test_what_one_prompt_is_refused_for_does_not_change_the_others(server):
    endpoint = Endpoint("stub", concurrency=1, timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(["too_long", "ok"], 20) == [None, "the kitchen"]
    assert server.requests["ok"][0][1].keys() == {"model", "messages", "temperature", "max_tokens"}


def test_prompts_are_made_as_they_can_be_asked(server):
    made, answered = [], {}

    def prompts():
        for number in range(9):
            made.append(number)
            assert len(made) - len(answered) <= 3
            yield "ok " * (number + 1)

    Endpoint("stub", concurrency=3, timeout=TIMEOUT).ask(prompts(), 20, answered.__setitem__)
    assert answered == dict.fromkeys(range(9), "the kitchen")


def test_a_server_that_drips_for_ever_is_left(server, monkeypatch):
    monkeypatch.setattr(api, "LONGEST_BACKOFF", 0.1)
    start = time.monotonic()
    endpoint = Endpoint("stub", timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(["drips"]) == [None]
    assert "no whole answer" in endpoint.failure
    assert TIMEOUT < time.monotonic() - start < 5 * TIMEOUT


def test_nobody_listens(server):
    url = "http://127.0.0.1:9/v1"
    endpoint = Endpoint("stub", base_url=url, concurrency=2, timeout=TIMEOUT, max_retries=1)
    assert endpoint.answer(["ok", "ok", "ok"]) == [None] * 3
    assert endpoint.failure == "Connection error."
    assert not server.requests


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"OPENAI_API_KEY": ""}, {}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_BASE_URL": "localhost:8000"}, {}, "OPENAI_BASE_URL must begin with http.*got localhost:8000"),
        ({}, {"concurrency": 0}, "--concurrency must be at least 1; got 0"),
        ({}, {"max_retries": -1}, "--max_retries must be at least 0; got -1"),
        ({}, {"timeout": 0}, "--timeout must be more than 0 seconds; got 0"),
    ],
)
def test_bad_settings_are_one_line(monkeypatch, environment, options, message):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        Endpoint("stub", **options)


def test_without_the_client_the_remedy_is_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r'pip install "lrmt\[api\]"'):
        Endpoint("stub")


def test_answers_become_a_submission_that_is_scored(server, tmp_path):
    answers = Endpoint("org/stub").answer(["ok", "ok ok"])
    variant = build_variant([*PARTS, "chat_template"])
    rows = [(target, text, "Where is Mary?") for target, text in zip(["kitchen", "office"], answers, strict=True)]
    cell = Predictions("org/stub", "qa1", "4k", variant, rows)
    write_predictions(
        tmp_path, cell, prompt_parts("qa1") | {"template": TEMPLATE}, {"temperature": 0, "max_tokens": 20}
    )
    assert {record["accuracy"] for record in score_folder(tmp_path)} == {0.5}


def test_the_cost_is_told_before_anything_is_asked(server):
    endpoint = Endpoint("stub")
    cost = endpoint.estimate_cost([("x" * 4000, 100, 20), ("x" * 401, 10, 30)], input_price=2.5, output_price=10)
    assert (cost.requests, cost.input_tokens, cost.output_tokens) == (110, 101_010, 2_300)
    assert cost.price == pytest.approx(0.252525 + 0.023)
    assert str(cost) == "110 requests, about 101,010 tokens in and at most 2,300 out, about 0.28 at the prices given"
    free = endpoint.estimate_cost([("x" * 4000, 1, 20)])
    assert free.price is None and "price" not in str(free)
    assert not server.requests


@pytest.mark.parametrize(
    ("text", "reason", "answered"),
    [
        ("bathroom", "stop", True),
        ("", "stop", False),
        (" ", "content_filter", False),
        ("bath", "content_filter", False),
        ("", "tool_calls", False),
        ("<think>kitchen</think>", "stop", False),
        ("<thinking>kitchen", "length", False),
        ("[THINK]kitchen is", "stop", False),
        (None, "stop", False),
    ],
)
def test_what_is_no_answer_is_a_failure(server, text, reason, answered):
    endpoint = Endpoint("stub-model")
    assert (endpoint._read(0, text, reason, 20) is not None) == answered == (endpoint.failure is None)
