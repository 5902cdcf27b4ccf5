"""lm-evaluation-harness on the tiny LLaMA under an untrained memory: right within a segment, lost beyond."""

import json
import sys
from configparser import ConfigParser
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lrmt
from lrmt.adapters.adapter import save_adapter
from lrmt.adapters.find import resolve_backbone
from lrmt.cli import main as lrmt_main
from lrmt.errors import UsageError
from lrmt.evaluation.babilong.prompts import count_new_tokens
from lrmt.evaluation.contenders import answer, build_contenders
from lrmt.evaluation.harness import run as harness
from lrmt.evaluation.harness import tasks as harness_tasks
from lrmt.evaluation.harness.model import HarnessModel
from lrmt.evaluation.harness.run import run_harness
from lrmt.evaluation.metrics import score
from lrmt.models import RmtForCausalLM
from lrmt.tasks.babi import simulate
from lrmt.tasks.registry import build_task

ROOT = Path(__file__).parents[3]
BABILONG = Path(lm_eval.tasks.__file__).parent / "babilong"
SEGMENT = 96
ROWS = 24


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "adapter"
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_pretrained(resolve_backbone("tiny-llama"))
    rmt = RmtForCausalLM.from_backbone(backbone, num_memory_tokens=2, segment_length=SEGMENT)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["memory_embedding"], task_type="CAUSAL_LM")
    save_adapter(get_peft_model(rmt, lora), folder, AutoTokenizer.from_pretrained(resolve_backbone("tiny-llama")))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """qa1 at 0k as the public data set lays it out: of every three rows one has filler before the facts, one after them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "data" / "qa1").mkdir(parents=True)
    rows = []
    for number, sample in enumerate(simulate("qa1", ROWS, 0)[4::5]):  # the last question of each story
        filler = ["The mill by the river stood idle that year."] * (6 + number % 8)
        facts = list(sample.facts[-4:])
        sentences = (facts, filler + facts, facts + filler)[number % 3]
        rows.append({"input": " ".join(sentences), "question": sample.question, "target": sample.answer})
    (folder / "data" / "qa1" / "0k.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(adapter):
    return HarnessModel(str(adapter), batch_size=4, device="cpu")


def ask(model, kind, *arguments):
    requests = [Instance(kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def predictions_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_babilong_from_local_files_equals_lrmt_evaluate(adapter, data, tmp_path):
    records = run_harness(
        str(adapter), ["babilong_qa1"], data_dir=str(data), batch_size=5, output_dir=str(tmp_path / "harness")
    )
    flags = f"--adapter_path {adapter} --dataset_name {data / 'rows.jsonl'} --scoring contains --batch_size 3"
    assert lrmt_main(["evaluate", *flags.split(), "--output_dir", str(tmp_path / "lrmt")]) == 0
    wanted = json.loads((tmp_path / "lrmt" / "results.json").read_text())[0]
    assert wanted["model"] == "rmt"
    assert records == [{**wanted, "task": "babilong_qa1"}]
    assert json.loads((tmp_path / "harness" / "results.json").read_text()) == records
    assert 0.2 < wanted["accuracy"] < 0.8

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    task = build_task("dataset", tokenizer, split="test", dataset_path=data / "rows.jsonl", segment_length=SEGMENT)
    examples = [task.example(index) for index in range(ROWS)]
    trained = build_contenders(lrmt.load(adapter))[0]
    outputs = [answer(trained, [e.prompt_ids], tokenizer, count_new_tokens(task))[0] for e in examples]
    report = json.loads((tmp_path / "harness" / "harness.json").read_text())["default"]
    assert report["configs"]["babilong_qa1"]["generation_kwargs"]["max_gen_toks"] == count_new_tokens(task)
    found = predictions_of(tmp_path / "harness")
    assert [row["output"] for row in found] == outputs
    rule = [float(score(e.target, o, e.question, e.task, "contains")) for e, o in zip(examples, outputs, strict=True)]
    assert [row["acc"] for row in found] == rule


def test_several_processes_are_refused(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--harness runs in one process; got 2. .*--num_processes 1"):
        run_harness(str(adapter), ["babilong_qa1"], output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_public_prompt_and_num_samples(adapter, data, tmp_path):
    flags = {"data_dir": str(data), "num_samples": 2, "output_dir": str(tmp_path)}
    public = run_harness(str(adapter), ["babilong_qa1"], prompt="public", **flags)
    trained = run_harness(str(adapter), ["babilong_qa1"], overwrite=True, **flags)
    assert public[0]["n"] == trained[0]["n"] == 2
    assert public[0]["length_tokens"] > trained[0]["length_tokens"] + 200  # an instruction and two examples
    report = json.loads((tmp_path / "harness.json").read_text())["default"]
    assert report["n-samples"]["babilong_qa1"] == {"original": ROWS, "effective": 2}


def test_needle_task_generated_by_the_harness(adapter, tmp_path, monkeypatch):
    seen, generate = [], RmtForCausalLM.generate

    def record(self, **arguments):
        seen.extend(arguments["attention_mask"].sum(1).tolist())
        return generate(self, **{**arguments, "max_new_tokens": 12})

    monkeypatch.setattr(RmtForCausalLM, "generate", record)
    monkeypatch.setattr("nltk.download", lambda name: None)  # sentences are split for essays only
    flags = {"num_samples": 3, "output_dir": str(tmp_path)}
    records = run_harness(str(adapter), ["niah_single_1"], max_seq_lengths=("512", "1400"), **flags)
    assert [(r["task"], r["n"]) for r in records] == [("niah_single_1", 3)] * 2
    assert [r["segments"] for r in records] == [-(-r["length_tokens"] // SEGMENT) for r in records]
    assert max(seen[:3]) < 512 < 1024 < min(seen[3:])  # the window of the backbone is 1024 tokens
    found = predictions_of(tmp_path)
    assert [row["length"] for row in found] == ["512"] * 3 + ["1400"] * 3
    assert {len(row["target"][0]) for row in found} == {7}
    # the same numbers again, whatever else was drawn before
    run_harness(str(adapter), ["niah_single_1"], max_seq_lengths=("512",), overwrite=True, **flags)
    assert [row["target"] for row in predictions_of(tmp_path)] == [row["target"] for row in found[:3]]


def test_needle_task_from_local_files(adapter, tmp_path):
    (tmp_path / "data" / "300").mkdir(parents=True)
    row = {
        "input": "The grass is green. The sky is blue. The pass key is 4711. Remember it. 4711 is the pass key. The sun is yellow.",
        "outputs": ["4711"], "gen_prefix": "What is the pass key? The pass key is", "max_length": 300,
    }  # fmt: skip
    other = row | {"outputs": ["nothing of this kind"]}
    text = "".join(json.dumps(each) + "\n" for each in (row, other))
    (tmp_path / "data" / "300" / "niah_single_2.jsonl").write_text(text)
    records = run_harness(
        str(adapter), ["niah_single_2"], max_seq_lengths=("300",), data_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert (records[0]["accuracy"], records[0]["n"]) == (0.5, 2)


def test_answers_do_not_depend_on_the_batch_and_stop(model):
    texts = ["Mary went to the garden. Where is Mary?", "John moved to the office. " * 20 + "Where is John?", "The"]
    arguments = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 6}
    together = ask(model, "generate_until", *((text, arguments) for text in texts))
    assert together == [ask(model, "generate_until", (text, arguments))[0] for text in texts]
    assert together[0].strip() == "garden"
    assert ask(model, "generate_until", (texts[0], {**arguments, "until": ["ard"]})) == [together[0].split("ard")[0]]


def test_the_backbone_s_generation_settings_change_nothing(model):
    owner = model.model.get_base_model()
    request = ("Mary went to the garden. Where is Mary?", {"until": [], "do_sample": False, "max_gen_toks": 6})
    plain, own = ask(model, "generate_until", request), owner.generation_config
    owner.generation_config = GenerationConfig(repetition_penalty=1.9, no_repeat_ngram_size=1, num_beams=2)
    try:
        assert ask(model, "generate_until", request) == plain
    finally:
        owner.generation_config = own


def test_special_tokens_in_a_text_are_text(model):
    ids = model.tok_encode("He wrote <s> and </s>.")
    assert not {model.tokenizer.bos_token_id, model.eot_token_id} & set(ids)
    assert model.tokenizer.decode(ids).strip() == "He wrote <s> and </s>."


def test_likelihoods_are_those_of_the_text_alone(model):
    pairs = [
        ("Mary went to the garden. Where is Mary?", " garden"),
        ("John moved to the office." * 20, " Where is John?"),
    ]
    pairs += [(pairs[0][0], " office"), ("", "The sky is blue.")]
    found = ask(model, "loglikelihood", *pairs)
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        prompt = model.tok_encode(context) if context else [model.eot_token_id]
        ids = prompt + (model.tok_encode(context + continuation)[len(prompt) if context else 0 :])
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(ids[len(prompt) :])
        assert likelihood == pytest.approx(float(logits[range(len(targets)), targets].sum()), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == targets).all())
    assert found[0][1] and not found[2][1]
    assert found[0][0] > found[2][0] + 1
    rolling = ask(model, "loglikelihood_rolling", ("The sky is blue.",), ("",))
    assert rolling == pytest.approx([found[3][0], 0.0], abs=1e-3)


def test_the_first_word_of_a_text_longer_than_the_window_counts(model):
    text = "John moved to the office. " * 180
    ids = model.tok_encode(text + "Where is John?")
    assert len(ids) > model.model.config.backbone_config.max_position_embeddings
    begun = ask(model, "loglikelihood", (text, " Where is John?"), ("Mary" + text[4:], " Where is John?"))
    assert begun[0][0] != begun[1][0]


def test_entry_point_of_lm_eval():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, value = setup["options.entry_points"]["lm_eval.models"].strip().split(" = ")
    assert (name, EntryPoint(name, value, "lm_eval.models").load()) == ("lrmt", HarnessModel)


def test_lm_eval_knows_the_model(adapter, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ntest_split: train\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {data / 'rows.jsonl'}}}\n"
        "doc_to_text: '{{input}} {{question}}'\ndoc_to_target: '{{target}}'\n"
        "generation_kwargs: {max_gen_toks: 2, until: []}\nmetric_list: [{metric: exact_match}]\n"
    )
    arguments = ["--model", "lrmt", "--model_args", f"pretrained={adapter}", "--tasks", str(tmp_path / "own.yaml")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--limit", "2", "--device", "cpu"])
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda index, paths: {})  # all of them take long
    harness.main()
    assert "|own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        ([], {}, "--harness names no task"),
        (["babilong_q1"], {}, "did you mean babilong_qa1?"),
        (["babilong_qa1"], {"data_dir": "nowhere"}, "--harness_data must be a folder; got nowhere"),
        (["babilong_qa2"], {"data_dir": "DATA"}, "has no 0k/qa2.jsonl; it holds: data/qa1/0k.json"),
        (["babilong_qa1"], {"data_dir": "DATA", "max_seq_lengths": ("4k",)}, "has no 4k/qa1.jsonl"),
        (["niah_single_1"], {"max_seq_lengths": ("1M",)}, "tokens (4096, 4k)"),
        (["babilong_qa1"], {}, "babilong_qa1 cannot load its data"),
        (["babilong_qa1"], {"prompt": "publik"}, "did you mean public?"),
        (["babilong_qa1"], {"num_samples": 0}, "--num_samples must be at least 1"),
        (["babilong_qa1"], {"output_dir": "DATA"}, "is not empty"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(adapter, data, monkeypatch, tasks, flags, message):
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=[BABILONG])  # all of them take long
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    flags = {name: str(data) if value == "DATA" else value for name, value in flags.items()}
    with pytest.raises(UsageError) as caught:
        run_harness(str(adapter), tasks, **flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (adapter / "harness").exists()


def test_bad_rows_are_refused(adapter, tmp_path):
    (tmp_path / "0k").mkdir()
    (tmp_path / "0k" / "qa1.jsonl").write_text('{"input": "a", "question": "b"}\n')
    with pytest.raises(UsageError, match="has no column target"):
        run_harness(str(adapter), ["babilong_qa1"], data_dir=str(tmp_path))
    (tmp_path / "0k" / "qa1.jsonl").write_text("no json\n")
    with pytest.raises(UsageError, match=r"qa1\.jsonl cannot be read"):
        run_harness(str(adapter), ["babilong_qa1"], data_dir=str(tmp_path))


def test_missing_extra_is_one_line(adapter, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install lrmt\[harness\]"):
        run_harness(str(adapter), ["babilong_qa1"])


def test_groups_and_tags_are_taken_apart():
    names = harness_tasks.find_tasks(["babilong", "babilong_qa3"])[1]
    assert names == [f"babilong_qa{n}" for n in range(1, 21)]
    assert "niah_single_1" in harness_tasks.find_tasks(["longcxt"])[1]
