"""An endpoint that answers 429, 500, garbage, slowly, or not at all: a server in this process."""

import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TIMEOUT = 1.0


def completion(text, finish_reason="stop"):
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}


class Stub(BaseHTTPRequestHandler):
    """A prompt is a list of what its tries meet, "500 slow ok"; the last goes on for ever.

    Other prompts meet what `server.script(prompt)` says, and are answered by `server.answer(prompt)`.
    """

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
        script = server.script(prompt).split()
        try:
            self.meet(script[min(number, len(script) - 1)], prompt, body)
        except OSError:  # the client has gone
            self.close_connection = True
        finally:
            with server.lock:
                server.in_flight -= 1

    def meet(self, what, prompt, body):
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        if what in ("429", "500", "503", "400", "401"):
            self.reply(
                {"error": {"message": f"refused with {what}"}},
                int(what),
                {"Retry-After": "1.2"} if what == "429" else {},
            )
        elif what == "ok":
            time.sleep(0.05)
            self.reply(completion(self.server.answer(prompt)))
        elif what == "thinks":  # a word a token, cut where the limit says
            words = f"<think> Let me see, {'and ' * 20} that is it. </think> {self.server.answer(prompt)}".split()
            self.reply(completion(" ".join(words[:limit]), "length" if len(words) > limit else "stop"))
        elif what == "keeps_thoughts_back":
            self.reply(completion("", "length") if limit < 30 else completion(self.server.answer(prompt)))
        elif what == "cut":
            self.reply(completion(self.server.answer(prompt), "length"))
        elif what == "new_names" and (refused := {"max_tokens", "temperature"} & body.keys()):
            name = max(refused) if len(refused) == 1 else "max_tokens"
            error = {"message": f"Unsupported parameter: '{name}'.", "param": name, "code": "unsupported_parameter"}
            self.reply({"error": error}, 400)
        elif what == "new_names":
            self.reply(completion(self.server.answer(prompt)))
        elif what == "too_long":
            error = {"message": "max_tokens is too large", "param": "max_tokens", "code": "invalid_value"}
            self.reply({"error": error}, 400)
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
    stub.script, stub.answer = str, lambda prompt: "the kitchen"
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
