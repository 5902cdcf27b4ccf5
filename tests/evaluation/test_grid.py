"""The grid on the tiny backbone: every baseline, depths, early stops, ranks, and the files that others read."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lrmt.adapters.adapter import save_adapter
from lrmt.cli import main
from lrmt.evaluation import run
from lrmt.evaluation.babilong.rescoring import score_folder
from lrmt.evaluation.contenders import Contender, EndpointContender
from lrmt.evaluation.grid import measure_cell
from lrmt.models import LandmarkForCausalLM, RmtForCausalLM
from lrmt.tasks.registry import build_task

ROOT = Path(__file__).parents[2]
TINY = ROOT / "lrmt" / "assets" / "tiny-llama"
SEGMENT = 80
LOCAL = ["backbone", "full", "sliding_window", "xl", "rag"]


def save(folder, method, backbone=TINY, **settings):
    """A memory that was never trained over a backbone that reads: right where everything stands in one segment."""
    torch.manual_seed(0)
    model = method.from_backbone(AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32), **settings)
    memory = method.memory_modules
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=memory, task_type="CAUSAL_LM")
    save_adapter(get_peft_model(model, lora), folder, AutoTokenizer.from_pretrained(TINY))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("grid") / "adapter", RmtForCausalLM, num_memory_tokens=2, segment_length=SEGMENT
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))


def evaluate(adapter, output_dir, flags):
    assert main(["evaluate", "--adapter_path", str(adapter), "--output_dir", str(output_dir), *flags.split()]) == 0
    return json.loads((output_dir / "results.json").read_text())


def accuracies(records, *keys):
    return {tuple(record[key] for key in keys): record["accuracy"] for record in records}


def test_every_local_baseline_and_what_it_can_see(adapter, tmp_path):
    flags = f"--task passkey --lengths 3 --num_samples 6 --depths 0 1 --baseline {' '.join(LOCAL)}"
    found = accuracies(evaluate(adapter, tmp_path / "out", flags), "model", "depth")
    assert found.keys() == {(name, depth) for name in ("rmt", *LOCAL) for depth in (0.0, 1.0)}
    for name in LOCAL:  # at the end of the text everybody sees the key
        assert found[name, 1.0] >= 4 / 6, name
    for name in ("backbone", "sliding_window", "xl"):  # at its beginning, three segments back, it is out of sight
        assert found[name, 0.0] == 0, name
    assert found["full", 0.0] >= 4 / 6 and found["rag", 0.0] >= 4 / 6
    assert (tmp_path / "out" / "depths.png").read_bytes().startswith(b"\x89PNG")


def test_a_cached_segment_reaches_one_segment_further_back(adapter, tmp_path):
    """The key is more than a segment before the question, and in the segment before that of the question and the answer."""
    flags = "--task passkey --lengths 2 --num_samples 6 --depths 0.2 --baseline sliding_window xl"
    found = accuracies(evaluate(adapter, tmp_path / "out", flags), "model")
    assert found["sliding_window",] == 0 and found["xl",] >= 4 / 6


def test_baselines_of_a_landmark_adapter_are_those_of_its_backbone(adapter, tmp_path):
    """Landmark attention takes the place of the backbone's own, which sees no difference."""
    settings = {"block_length": 8, "context_length": SEGMENT, "top_k": 2}
    landmark = save(tmp_path / "landmark", LandmarkForCausalLM, **settings)
    flags = f"--task passkey --lengths 2 --num_samples 6 --depths 0.5 --baseline {' '.join(LOCAL)} untrained"
    found = accuracies(evaluate(landmark, tmp_path / "out", flags), "model")
    wanted = accuracies(evaluate(adapter, tmp_path / "rmt", flags), "model")
    assert {name: found[name,] for name in LOCAL} == {name: wanted[name,] for name in LOCAL}
    assert found["landmark",] == found["untrained",]
    assert found["xl",] >= 4 / 6


def test_generation_settings_of_the_backbone_s_files_change_nothing(adapter, tmp_path):
    """As many instruction-tuned models ship them; beams no memory could be measured with."""
    backbone = shutil.copytree(TINY, tmp_path / "backbone")
    path = backbone / "generation_config.json"
    settings = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "num_beams": 2, "suppress_tokens": [20, 21, 22]}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    leaking = save(tmp_path / "adapter", RmtForCausalLM, backbone, num_memory_tokens=2, segment_length=SEGMENT)
    flags = f"--task passkey --lengths 1 --num_samples 6 --baseline {' '.join(LOCAL)}"
    found = accuracies(evaluate(leaking, tmp_path / "out", flags), "model")
    assert found == accuracies(evaluate(adapter, tmp_path / "plain", flags), "model")
    assert found["rmt",] >= 4 / 6


@pytest.mark.parametrize("target", ["one\ntwo", "a <s> b", "</i><s>"])
def test_what_the_tokenizer_says_of_a_target_is_right(tmp_path, target):
    """A contender whose ids are those of training is right, whatever stands in a target."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    row = {"input": "He wrote <s> and left.", "question": "What?", "target": target}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = build_task(
        "dataset", tokenizer, split="test", dataset_name=str(tmp_path / "rows.jsonl"), segment_length=SEGMENT
    )
    ids = torch.from_numpy(task.example(0).answer_ids)[None]
    oracle = Contender("oracle", lambda input_ids, **_: torch.cat([input_ids, ids, 0 * ids], dim=1))
    (record,), answers = measure_cell(
        [oracle], task, None, tokenizer=tokenizer, segment_length=SEGMENT, num_samples=1, batch_size=1
    )
    assert record["accuracy"] == 1.0, answers
    prompt = EndpointContender(SimpleNamespace(model="stub"), tokenizer).prompt(task.example(0))
    assert "He wrote <s> and left." in prompt


def test_everybody_may_say_twenty_tokens(adapter, tmp_path, monkeypatch):
    asked = []
    generate = LlamaForCausalLM.generate

    def watch(self, *arguments, **named):
        asked.append((named["input_ids"].shape[1], named["max_new_tokens"]))
        return generate(self, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watch)
    evaluate(
        adapter, tmp_path / "out", "--task qa1 --lengths 4 --num_samples 2 --baseline backbone rag --rag_chunks 90"
    )
    assert {new for _, new in asked} == {20}
    shown = max(width for width, _ in asked)
    assert 3 * SEGMENT < shown < 1024  # passages may fill the backbone's own window, not a segment


def test_passages_that_cannot_fit_are_refused_and_nothing_is_written(adapter, tmp_path, capsys):
    flags = ["--task", "qa1", "--lengths", "2", "--baseline", "rag", "--rag_chunks", "1010"]
    with pytest.raises(SystemExit):
        main(["evaluate", "--adapter_path", str(adapter), "--output_dir", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert "--rag_chunks 1010 does not fit into the backbone's window of 1024" in error and error.endswith("or less\n")
    assert not (tmp_path / "out").exists()


def test_facts_alone_and_predictions_that_score_the_same(adapter, tmp_path, capsys):
    flags = "--task qa1 qa2 --lengths 0k 2 --num_samples 12 --baseline backbone rag"
    records = evaluate(adapter, tmp_path / "out", flags)
    assert {(r["length_tokens"], r["segments"]) for r in records} == {(0, 0), (2 * SEGMENT, 2)}
    rescored = [r for r in score_folder(tmp_path / "out" / "babilong_evals") if r["rule"] == "official"]
    assert {r["model"] for r in rescored} == {"adapter/rmt", "adapter/backbone", "adapter/rag"}
    expected = {
        (f"adapter/{m}", t, n): a for (m, t, n), a in accuracies(records, "model", "task", "length_tokens").items()
    }
    assert accuracies(rescored, "model", "task", "length_tokens") == expected
    assert len(set(expected.values())) > 2  # neither all right nor all wrong

    def describe(name):
        (path,) = (tmp_path / "out" / "babilong_evals" / "adapter" / name).glob("qa1_0k_*.json")
        assert path.stem.endswith("instruction_no_examples_no_post_prompt_no_chat_template_no")
        told = json.loads(path.read_text())
        assert told["generate_kwargs"] == {"max_new_tokens": 20, "do_sample": False, "num_beams": 1}
        return told["prompt"]["template"], told["prompt"].get("shown")

    assert describe("rmt") == ("{context} {question}", None)
    assert describe("backbone") == ("{context} {question}", f"the last {SEGMENT} tokens")
    assert describe("rag") == ("{passages} {question}", "the 5 best passages (sentences) by BM25, in order of document")


@pytest.mark.parametrize("position", ["first", "both"])
def test_predictions_say_where_the_question_stands(adapter, tmp_path, position):
    flags = f"--task qa1 --lengths 0k --num_samples 2 --baseline rag --question_position {position}"
    evaluate(adapter, tmp_path / "out", flags)
    templates = {
        path.parent.name: json.loads(path.read_text())["prompt"]["template"]
        for path in (tmp_path / "out" / "babilong_evals").rglob("*.json")
    }
    assert templates == {
        "rmt": "{question} {context}" + (" {question}" if position == "both" else ""),
        "rag": "{passages} {question}",
    }


def test_a_baseline_may_join_later_and_finished_cells_are_kept(adapter, tmp_path, monkeypatch):
    measured = []
    measure = run.measure_cell

    def watch(contenders, *arguments, **named):
        measured.append([contender.name for contender in contenders])
        return measure(contenders, *arguments, **named)

    monkeypatch.setattr(run, "measure_cell", watch)
    flags = "--task passkey --lengths 1 2 --num_samples 4 --baseline backbone"
    first = evaluate(adapter, tmp_path / "out", flags)
    assert measured == [["rmt", "backbone"]] * 2
    measured.clear()
    assert evaluate(adapter, tmp_path / "out", f"{flags} rag")[: len(first)] == first
    assert measured == [["rag"]] * 2
    with pytest.raises(SystemExit):  # other passages are another measurement
        evaluate(adapter, tmp_path / "out", f"{flags} rag --rag_top_k 3")


def test_hopeless_models_are_not_asked_longer_texts(adapter, tmp_path):
    flags = "--task passkey --lengths 1 3 4 --num_samples 10 --depths 0 --baseline backbone full --stop_below 0.5"
    found = accuracies(evaluate(adapter, tmp_path / "out", flags), "model", "segments")
    assert found["backbone", 1] >= 0.8 and found["backbone", 3] == 0
    assert ("backbone", 4) not in found and found["full", 4] >= 0  # of whom there was hope still


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(adapter, tmp_path):
    flags = "--task qa1 passkey --lengths 1 2 --num_samples 10 --batch_size 3 --baseline backbone rag"
    alone = evaluate(adapter, tmp_path / "one", flags)
    command = ["evaluate", "--adapter_path", adapter, "--output_dir", tmp_path / "two", *flags.split()]
    ranks = run_ranks("lrmt.cli", *command, cwd=tmp_path)
    assert ["results.json" in rank.stdout for rank in ranks] == [True, False]
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == alone
    one, two = (sorted((tmp_path / name / "babilong_evals").rglob("*.csv")) for name in ("one", "two"))
    assert len(one) == 6 and [p.read_text() for p in one] == [p.read_text() for p in two]
