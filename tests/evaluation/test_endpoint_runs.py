"""`lrmt evaluate --baseline api` against a server that answers, refuses, dawdles or is dead (conftest.py)."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import run_ranks
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lrmt.adapters.adapter import save_adapter
from lrmt.cli import main
from lrmt.errors import UsageError
from lrmt.evaluation import api
from lrmt.evaluation.answers import Answer, KeptAnswers
from lrmt.evaluation.babilong.rescoring import score_folder
from lrmt.models import RmtForCausalLM

TINY = Path(__file__).parents[2] / "lrmt" / "assets" / "tiny-llama"
SEGMENT = 80


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model as small as can be: it is the endpoint that is looked at."""
    folder = tmp_path_factory.mktemp("endpoint")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    backbone = LlamaForCausalLM.from_pretrained(folder / "backbone")
    rmt = RmtForCausalLM.from_backbone(backbone, num_memory_tokens=2, segment_length=SEGMENT)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["memory_embedding"], task_type="CAUSAL_LM")
    save_adapter(get_peft_model(rmt, lora), folder / "adapter", tokenizer)
    return folder / "adapter"


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, server):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api, "LONGEST_BACKOFF", 0.1)
    server.script = lambda prompt: "ok"
    server.answer = lambda prompt: re.search(r"pass key is (\d+)", prompt)[1]


def evaluate(adapter, output_dir, flags, code=0):
    command = ["evaluate", "--adapter_path", str(adapter), "--output_dir", str(output_dir), "--baseline", "api"]
    assert main([*command, *flags.split()]) == code
    records = json.loads((output_dir / "results.json").read_text())
    assert all(r["accuracy"] is not None for r in records if r["model"] == "rmt")
    return [record for record in records if record["model"] != "rmt"]


def test_a_cell_is_asked_at_once_and_again_after_429_and_500(adapter, server, tmp_path, capsys):
    number = {}
    first = ["429 ok", "500 ok", "ok"] * 3  # of the first cell
    server.script = lambda prompt: dict(enumerate(first)).get(number.setdefault(prompt, len(number)), "ok")
    flags = "--task passkey --lengths 1 2 --num_samples 9 --batch_size 1 --api_concurrency 6 --api_model org/stub"
    records = evaluate(adapter, tmp_path / "out", f"{flags} --api_output_price 10")
    assert [(r["model"], r["segments"], r["accuracy"], r["n"]) for r in records] == [
        ("org/stub", 1, 1.0, 9), ("org/stub", 2, 1.0, 9)
    ]  # fmt: skip
    assert len(server.requests) == 18 and server.most_in_flight == 6  # whatever the batch size
    asked = [found[-1][1]["max_tokens"] for found in server.requests.values()]
    assert "18 requests" in (out := capsys.readouterr().out) and f"at most {sum(asked)} out" in out
    kept = (tmp_path / "out" / "answers" / "org_stub" / "passkey_160.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in kept] == list(range(9))


def test_slow_answers_fail_their_cell_and_the_others_are_paid_for_once(adapter, server, tmp_path, capsys):
    slow = set()

    def script(prompt):
        if len(server.requests) in (3, 5) and len(slow) < 2:
            slow.add(prompt)
        return "slow" if prompt in slow else "ok"

    server.script = script
    flags = "--task passkey --lengths 1 2 --num_samples 8 --api_model stub --api_timeout 1 --api_max_retries 0"
    records = evaluate(adapter, tmp_path / "out", f"{flags} --api_concurrency 2")
    assert [(r["accuracy"], r.get("error")) for r in records] == [(None, "Request timed out."), (1.0, None)]
    assert "stub failed on passkey, 1 segments: Request timed out." in capsys.readouterr().out
    assert len(server.requests) == 16
    kept = (tmp_path / "out" / "answers" / "stub" / "passkey_80.jsonl").read_text().splitlines()
    assert len(kept) == 6

    server.script = lambda prompt: "ok"
    server.requests.clear()
    again = evaluate(adapter, tmp_path / "out", flags)
    assert sorted((r["segments"], r["accuracy"]) for r in again) == [(1, 1.0), (2, 1.0)]
    assert server.requests.keys() == slow
    assert "stub: 2 requests" in capsys.readouterr().out

    server.requests.clear()
    evaluate(adapter, tmp_path / "out", f"{flags} --overwrite")
    assert len(server.requests) == 16  # anew


def test_a_dead_endpoint_is_asked_a_few_times_in_all(adapter, server, tmp_path, capsys):
    server.script = lambda prompt: "500"
    flags = "--task passkey qa1 --lengths 1 2 --num_samples 20 --batch_size 2 --api_concurrency 4 --api_model stub"
    records = evaluate(adapter, tmp_path / "out", f"{flags} --api_max_retries 0")
    assert 4 <= len(server.requests) <= 8
    assert [r["accuracy"] for r in records] == [None] * 4
    assert "refused with 500" in records[0]["error"] and not records[0]["error"].startswith("not asked")
    assert all(r["error"].startswith("not asked: the endpoint was given up (") for r in records[1:])
    assert "failed on qa1, 2 segments: not asked" in capsys.readouterr().out


def test_what_was_answered_before_a_run_was_stopped_is_kept(adapter, server, tmp_path, monkeypatch):
    flags = "--task passkey --lengths 1 --num_samples 8 --api_model stub --api_concurrency 1"
    add = KeptAnswers.add

    def stopped(self, answers):
        add(self, answers)
        if len(self.answers) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(KeptAnswers, "add", stopped)
        assert evaluate(adapter, tmp_path / "out", flags, code=130) == []
    server.requests.clear()
    (record,) = evaluate(adapter, tmp_path / "out", flags)
    assert record["accuracy"] == 1.0 and len(server.requests) == 3


def test_a_budget_too_small_for_thoughts_is_told_and_may_be_raised(adapter, server, tmp_path, capsys):
    server.script = lambda prompt: "thinks"
    flags = "--task passkey --lengths 1 --num_samples 4 --api_model stub"
    (record,) = evaluate(adapter, tmp_path / "out", flags)
    assert record["accuracy"] is None and "cut after 20 tokens" in record["error"]
    assert "--api_max_tokens" in record["error"]
    (record,) = evaluate(adapter, tmp_path / "out", f"{flags} --api_max_tokens 60")
    assert record["accuracy"] == 1.0
    assert "at most 240 out" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # what is there would have failed
        evaluate(adapter, tmp_path / "out", f"{flags} --api_max_tokens 10")
    assert "api_max_tokens 60, now 10" in capsys.readouterr().err


def test_predictions_of_an_endpoint_say_how_it_was_asked(adapter, server, tmp_path):
    server.answer = lambda prompt: "kitchen"
    flags = "--task qa1 --lengths 0k --num_samples 4 --question_position both --api_model stub"
    (record,) = evaluate(adapter, tmp_path / "out", flags)
    (path,) = (tmp_path / "out" / "babilong_evals" / "api" / "stub").glob("*.json")
    assert path.stem == "qa1_0k_instruction_yes_examples_yes_post_prompt_yes_chat_template_yes"
    told = json.loads(path.read_text())
    assert told["generate_kwargs"] == {"max_new_tokens": 20, "temperature": 0}
    (found,) = [r for r in score_folder(path.parent) if r["rule"] == "official"]
    assert found["accuracy"] == record["accuracy"]
    for prompt in server.requests:
        context, question = re.search(r"<context>\n(.*)\n</context>\n\nQuestion: (.*)", prompt, re.DOTALL).groups()
        assert prompt == told["prompt"]["template"].format(**told["prompt"], context=context, question=question)
        assert question not in context  # it is told once
        assert context.startswith(("Mary", "John", "Sandra", "Daniel"))


@pytest.mark.distributed
def test_two_processes_share_what_is_asked_and_keep_all_of_it(adapter, server, tmp_path):
    flags = "--task passkey --lengths 1 --num_samples 9 --batch_size 2 --api_model stub --api_concurrency 4"
    lost = []

    def script(prompt):
        if len(server.requests) == 4:
            lost.append(prompt)
        return "400" if prompt in lost else "ok"

    server.script = script
    command = ["evaluate", "--adapter_path", adapter, "--output_dir", tmp_path / "out", "--baseline", "api"]
    told = [rank.stdout for rank in run_ranks("lrmt.cli", *command, *flags.split(), cwd=tmp_path)]
    assert "stub failed on passkey, 1 segments: Error code: 400" in told[0] and "stub failed" not in told[1]
    assert len(server.requests) == 9 and server.most_in_flight <= 4
    server.requests.clear()
    server.script = lambda prompt: "ok"
    (record,) = evaluate(adapter, tmp_path / "out", flags)
    assert record["accuracy"] == 1.0 and len(server.requests) == len(set(lost))


def answer_of(index, output="12345"):
    return Answer(index, "12345", output, "What?", "passkey")


def test_answers_are_added_to_their_file(tmp_path):
    path = tmp_path / "answers" / "cell.jsonl"
    kept, contents = KeptAnswers(path), []
    for index in (2, 0, 1):
        kept.add([answer_of(index)])
        contents.append(path.read_bytes())
    assert all(after.startswith(before) for before, after in zip(contents, contents[1:], strict=False))
    assert [json.loads(line)["index"] for line in contents[-1].splitlines()] == [2, 0, 1]
    inode = path.stat().st_ino
    kept.add([answer_of(2)])  # known already
    assert path.read_bytes() == contents[-1] and path.stat().st_ino == inode
    kept.add([answer_of(0, "999")])  # of several to one index the last counts
    assert KeptAnswers(path).answers == {0: answer_of(0, "999"), 1: answer_of(1), 2: answer_of(2)}
    kept.settle([answer_of(3)])  # of another rank
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    kept.add([answer_of(4)])
    assert sorted(KeptAnswers(path).answers) == [0, 1, 2, 3, 4]
    KeptAnswers(path, write=False).add([answer_of(5)])
    KeptAnswers(path, fresh=True, write=False)
    assert sorted(KeptAnswers(path).answers) == [0, 1, 2, 3, 4]
    assert KeptAnswers(path, fresh=True).answers == {} and not path.exists()


@pytest.mark.parametrize("cut", [1, 7, -3])
def test_half_a_line_at_the_end_is_asked_again(tmp_path, cut):
    path = tmp_path / "cell.jsonl"
    KeptAnswers(path).add([answer_of(0), answer_of(1), answer_of(2, "the café")])
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:cut])
    kept = KeptAnswers(path)
    assert sorted(kept.answers) == [0, 1]
    kept.add([answer_of(2)])
    assert path.read_bytes() == b"".join(whole) + last.replace(b"the caf\\u00e9", b"12345")
    assert sorted(KeptAnswers(path).answers) == [0, 1, 2]


def test_a_damaged_line_before_the_last_is_refused(tmp_path):
    path = tmp_path / "cell.jsonl"
    KeptAnswers(path).add([answer_of(0), answer_of(1)])
    first, last = path.read_bytes().splitlines(keepends=True)
    for damaged in (first[:7] + b"\n" + last, b"\xff" + first + last, first + b"\n" + last[:7]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="holds no answers"):
            KeptAnswers(path)
        assert path.read_bytes() == damaged


def test_damaged_answers_are_one_line(tmp_path):
    (tmp_path / "qa1_80.jsonl").write_text('{"index": 1\n')
    with pytest.raises(UsageError, match="qa1_80.jsonl holds no answers .*; remove it to ask again"):
        KeptAnswers(tmp_path / "qa1_80.jsonl")
