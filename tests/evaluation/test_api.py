"""An endpoint that answers 429, 500, garbage, slowly, or not at all, against a server in this process."""

import json
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lrmt.errors import UsageError
from lrmt.evaluation import api
from lrmt.evaluation.api import Endpoint
from lrmt.evaluation.prompts import PARTS, TEMPLATE, prompt_parts
from lrmt.evaluation.rescore import score_folder
from lrmt.evaluation.submission import Predictions, build_variant, write_predictions

TIMEOUT = 1.0
TRIES = 3


def completion(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}


class Stub(BaseHTTPRequestHandler):
    """A prompt is a list of what its tries meet, "500 slow ok"; the last goes on for ever."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            server.requests[prompt].append((time.monotonic(), body, self.headers))
            number = len(server.requests[prompt]) - 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        script = prompt.split()
        try:
            self.meet(script[min(number, len(script) - 1)])
        except OSError:  # the client has gone
            self.close_connection = True
        finally:
            with server.lock:
                server.in_flight -= 1

    def meet(self, what):
        if what in ("429", "500", "503", "400", "401"):
            self.reply(
                {"error": {"message": f"refused with {what}"}},
                int(what),
                {"Retry-After": "1.2"} if what == "429" else {},
            )
        elif what == "ok":
            time.sleep(0.05)
            self.reply(completion("the kitchen"))
        elif what == "slow":
            self.server.closing.wait(2 * TIMEOUT)
            self.reply(completion("too late"))
        elif what == "silent":
            self.server.closing.wait(60)
            self.close_connection = True
        elif what == "drips":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        elif what == "hangs_up":
            self.close_connection = True
        elif what == "html":
            self.reply(b"<html>Welcome</html>", kind="text/html")
        elif what == "half":
            self.reply(b'{"choices": [', kind="application/json")
        elif what == "no_choice":
            self.reply(completion("") | {"choices": []})
        elif what == "nothing":
            self.reply({"object": "list"})
        elif what == "no_text":
            self.reply(completion(None))
        else:
            raise AssertionError(what)

    def reply(self, content, status=200, headers=(), kind="application/json"):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)  # or the kernel drops what comes at once
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.daemon_threads = True
    stub.requests, stub.lock, stub.closing = defaultdict(list), threading.Lock(), threading.Event()
    stub.in_flight = stub.most_in_flight = 0
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{stub.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield stub
    stub.closing.set()
    stub.shutdown()
    thread.join()
    stub.server_close()


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
    assert len(server.requests) in (2, 3)  # the second fails while a third is on its way
    # one that answers now and then is asked everything
    prompts = ["ok", *(f"{'400 ' * n}400" for n in range(10)), "ok ok"]
    endpoint = Endpoint("stub", concurrency=1, timeout=TIMEOUT, max_retries=0)
    assert endpoint.answer(prompts) == ["the kitchen", *[None] * 10, "the kitchen"]


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
    cost = endpoint.estimate_cost([("x" * 4000, 100), ("x" * 401, 10)], 20, input_price=2.5, output_price=10)
    assert (cost.requests, cost.input_tokens, cost.output_tokens) == (110, 101_010, 2_200)
    assert cost.price == pytest.approx(0.252525 + 0.022)
    assert str(cost) == "110 requests, about 101,010 tokens in and at most 2,200 out, about 0.27 at the prices given"
    free = endpoint.estimate_cost([("x" * 4000, 1)])
    assert free.price is None and "price" not in str(free)
    assert not server.requests
