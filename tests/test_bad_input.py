"""Bad input, in one table: one line that names flag, value and remedy, exit code 2, and nothing written."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import CpmAntConfig, CpmAntForCausalLM

from lrmt import cli
from lrmt.errors import exit_on_error
from lrmt.publishing.merge import merge_adapter
from lrmt.tasks import prose


@pytest.fixture(scope="module")
def world(backbones, trained, tmp_path_factory):
    """A folder of everything that can be wrong; the rows name its parts."""
    world = tmp_path_factory.mktemp("world")
    trainer, run = trained
    (world / "empty_folder").mkdir()
    (world / "full").mkdir()
    (world / "full" / "mine.txt").write_text("mine")
    row = {"input": "The mill stood idle.", "question": "Where is it?", "target": "here"}
    (world / "empty.jsonl").write_text("")
    (world / "rows.csv").write_text("input,question,target\n")
    (world / "column.jsonl").write_text(json.dumps({k: v for k, v in row.items() if k != "target"}) + "\n")
    (world / "blank.jsonl").write_text(json.dumps(row | {"target": " "}) + "\n")
    (world / "cut.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:-9])
    (world / "long.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [row, row | {"question": "Who? " * 60}, row])
    )
    (world / "shards" / "4k").mkdir(parents=True)
    (world / "shards" / "4k" / "qa1.jsonl").write_text(
        f"{json.dumps(row | {'target': 'kitchen'})}\n\n{json.dumps(row | {'target': ''})}\n"
    )
    (world / "loop").symlink_to("loop")
    shutil.copytree(backbones["llama"], world / "claims_4bit")
    config = json.loads((world / "claims_4bit" / "config.json").read_text())
    claim = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (world / "claims_4bit" / "config.json").write_text(json.dumps(config | {"quantization_config": claim}))
    (world / "broken.yaml").write_text("segment_length: [1,\n")
    (world / "unknown.yaml").write_text("segment_lenght: 80\n")
    (world / "type.yaml").write_text("segment_length: long\n")
    (world / "babi").mkdir()
    (world / "babi" / "qa1_train.txt").write_text("1 Mary moved to the bathroom.\n2 Where is Mary? \tbathroom\t1\n")
    (world / "predictions").mkdir()
    cell = "qa1_4k_instruction_no_examples_no_post_prompt_no.csv"
    (world / "predictions" / cell).write_text(",target,output\n0,kitchen,kitchen\n")
    (world / "labels").mkdir()
    (world / "labels" / cell).write_text(",target,output,question\n0,cellar,cellar,Where is Mary?\n")
    (world / "cut_predictions").mkdir()
    (world / "cut_predictions" / cell).write_text("")
    (world / "label").mkdir()
    (world / "label" / "qa1_test.txt").write_text("1 Mary went to the cellar.\n2 Where is Mary? \tcellar\t1\n")
    (world / "book.txt").write_text(
        "The heavy lantern of the old surveyor stood beside the narrow window all winter.\n"
    )
    (world / "prose.txt").write_text("\n".join(prose.write(300, 0)))
    tokenizer = trainer.processing_class
    cpm = CpmAntConfig(
        vocab_size=1100, hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=32, num_hidden_layers=1
    )
    CpmAntForCausalLM(cpm).save_pretrained(world / "no_embeds")
    tokenizer.save_pretrained(world / "no_embeds")
    shutil.copytree(run, world / "run")
    shutil.copytree(run / "checkpoint-6", world / "run" / "checkpoint-7")
    (world / "run" / "checkpoint-7" / "curriculum.json").unlink()
    keep = shutil.ignore_patterns("checkpoint-*")
    shutil.copytree(run, world / "foreign", ignore=keep)
    config = json.loads((run / "config.json").read_text()) | {"backbone_name": str(backbones["mistral"])}
    (world / "foreign" / "config.json").write_text(json.dumps(config))
    shutil.copytree(run, world / "half", ignore=keep)
    (world / "half" / "adapter_model.safetensors").unlink()
    shutil.copytree(run, world / "cut", ignore=keep)
    (world / "cut" / "adapter_model.safetensors").write_bytes(b"\x00" * 50)
    merge_adapter(str(world / "run"), str(world / "merged"))
    return world


TRAIN = [  # command line, what the line says: flag, value, remedy
    ("--segment_lenght 80", ["unknown flag", "--segment_lenght", "did you mean `--segment_length`"]),
    ("--config unknown.yaml", ["unknown key in unknown.yaml", "segment_lenght", "did you mean `segment_length`"]),
    ("--config type.yaml", ["segment_length", "type.yaml", "'long'", "--help"]),
    ("--config broken.yaml", ["--config", "broken.yaml", "not YAML"]),
    ("--config nowhere.yaml", ["--config", "nowhere.yaml", "broken.yaml"]),
    ("--segment_length long", ["--segment_length", "'long'", "int"]),
    ("--segment_length 16 --num_memory_tokens 8", ["--segment_length", "2 × `--num_memory_tokens`", "16 and 8", "17 or more"]),
    ("--segment_length 250", ["--segment_length", "window of 256", "250 and 4", "248 or less"]),
    ("--num_memory_tokens -1", ["--num_memory_tokens", "-1", "16"]),
    ("--num_memory_tokens 0", ["--num_memory_tokens", "got 0", "16"]),
    ("--bptt_segments 0", ["--bptt_segments", "0", "1 or more"]),
    ("--segment_alignment middle", ["--segment_alignment", "middle", "left or right"]),
    ("--segment_length 20", ["20 tokens", "or more"]),
    ("--model_name_or_path no_embeds --attn_implementation eager --load_in_4bit false",
     ["--model_name_or_path", "CpmAnt", "inputs_embeds", "LLaMA"]),
    ("--model_name_or_path ./nowhere", ["--model_name_or_path", "./nowhere", "tiny-llama"]),
    ("--model_name_or_path empty_folder", ["--model_name_or_path", "empty_folder", "no config.json"]),
    ("--model_name_or_path full", ["--model_name_or_path", "full", "found: mine.txt"]),
    ("--model_name_or_path some/model", ["--model_name_or_path", "some/model"]),
    ("--lora_target_modules qkv", ["--lora_target_modules", "qkv", "LlamaForCausalLM"]),
    ("--lora_r 0", ["--lora_r", "got 0", "1 or more"]),
    ("--lora_alpha 0", ["--lora_alpha", "got 0", "1 or more"]),
    ("--lora_dropout 1", ["--lora_dropout", "[0, 1)", "got 1.0"]),
    ("--seed -1", ["--seed", "[0, 2**32)", "got -1"]),
    ("--seed 4294967296", ["--seed", "[0, 2**32)", "got 4294967296"]),
    ("--dataset_train_split train", ["unknown flag", "`--dataset_split`"]),
    ("--ignore_bias_buffers true", ["unknown flag", "--ignore_bias_buffers"]),
    ("--load_in_8bit true", ["--load_in_8bit", "True", "--load_in_4bit"]),
    ("--dtype int8", ["--dtype", "int8", "bfloat16"]),
    ("--task passkeys", ["--task", "passkeys", "did you mean passkey"]),
    ("--task qa1 --babi_dir nowhere", ["--babi_dir", "nowhere", "not a folder"]),
    ("--task qa1 --babi_dir empty_folder", ["--babi_dir", "empty_folder", "qa1_train.txt"]),
    ("--task qa2 --babi_dir babi", ["--babi_dir", "babi", "qa2_train.txt", "it holds: qa1_train.txt"]),
    ("--task qa1 --background_dir empty_folder", ["--background_dir", "empty_folder", ".txt"]),
    ("--task qa1 --question_position middle", ["--question_position", "middle", "last, first, both"]),
    ("--task qa1 --max_n_facts 0", ["--max_n_facts", "0", "1 or more"]),
    ("--num_digits 0", ["--num_digits", "0"]),
    ("--task dataset", ["--task dataset", "--dataset_name"]),
    ("--dataset_name nowhere.jsonl", ["--dataset_name", "nowhere.jsonl", "does not exist", "empty.jsonl"]),
    ("--dataset_name rows.csv", ["--dataset_name", "rows.csv", ".jsonl"]),
    ("--dataset_name empty.jsonl", ["empty.jsonl", "no rows", "input, question, target"]),
    ("--dataset_name column.jsonl", ["column.jsonl row 1", "'target'", "found: input, question"]),
    ("--dataset_name blank.jsonl", ["blank.jsonl row 1", "'target'", "fill it in"]),
    ("--dataset_name cut.jsonl", ["cut.jsonl:2", "not JSON"]),
    ("--dataset_name long.jsonl", ["--segment_length", "80", "long.jsonl row 2", "raise it"]),
    ("--curriculum_stages 2 1", ["--curriculum_stages", "[2, 1]", "Sort"]),
    ("--curriculum_stages 0", ["--curriculum_stages", "[0]", "1 or more"]),
    ("--stage_max_steps 1 2 3", ["--stage_max_steps", "[1, 2, 3]", "2 stages"]),
    ("--promotion_accuracy 95", ["--promotion_accuracy", "95", "(0, 1]"]),
    ("--stage_lr_decay 0", ["--stage_lr_decay", "0.0", "(0, 1]"]),
    ("--memory_noise -0.1", ["--memory_noise", "-0.1", "0 or more"]),
    ("--init_adapter_path nowhere", ["--init_adapter_path", "nowhere", "no adapter"]),
    ("--init_adapter_path run --lora_r 3", ["--init_adapter_path", "run", "`--lora_r`"]),
    ("--init_adapter_path run --model_name_or_path MISTRAL", ["--init_adapter_path", "run", "backbone_fingerprint", "agree"]),
    ("--eval_samples 0", ["--eval_samples", "0", "1 or more"]),
    ("--per_device_train_batch_size 0", ["--per_device_train_batch_size", "0", "1 or more"]),
    ("--gradient_accumulation_steps 0", ["--gradient_accumulation_steps", "0", "1 or more"]),
    ("--eval_steps 0", ["--eval_steps", "0", "1 or more"]),
    ("--output_dir full", ["--output_dir", "full", "not empty", "--overwrite_output_dir"]),
    ("--output_dir full/mine.txt", ["--output_dir", "full/mine.txt", "name a folder"]),
    ("--resume_from_checkpoint true", ["--resume_from_checkpoint", "no whole checkpoint", "start without"]),
    ("--output_dir full --resume_from_checkpoint true",
     ["--resume_from_checkpoint", "full holds no whole checkpoint", "--output_dir"]),
    ("--dry_run --task qa1 --babi_vocabulary nowhere", ["--babi_vocabulary nowhere", "YAML or JSON"]),
    ("--output_dir run --resume_from_checkpoint run/checkpoint-9", ["run/checkpoint-9", "no such folder", "checkpoint-6"]),
    ("--output_dir run --resume_from_checkpoint run/checkpoint-7", ["run/checkpoint-7", "half-written", "curriculum.json", "say true"]),
    ("--output_dir full --resume_from_checkpoint run/checkpoint-6", ["--output_dir", "full", "not empty"]),
    ("--output_dir run --resume_from_checkpoint true --lora_r 3", ["--resume_from_checkpoint", "`--lora_r` 3"]),
    ("--output_dir run --resume_from_checkpoint true --use_rslora true", ["--resume_from_checkpoint", "`--use_rslora` True"]),
    ("--output_dir run --resume_from_checkpoint true --curriculum_stages 1", ["--resume_from_checkpoint", "stages", "same curriculum"]),
    ("--output_dir run --resume_from_checkpoint true --learning_rate 1e-2 --model_name_or_path MISTRAL",
     ["another backbone", "--model_name_or_path"]),
    ("--learning_rate nan", ["--learning_rate", "'nan'", "float"]),
    ("--max_grad_norm -1", ["--max_grad_norm", "-1", "not be negative"]),
    ("--save_total_limit 0", ["--save_total_limit", "1 or more", "got 0"]),
    ("--save_steps 0", ["--save_steps", "more than 0"]),
    ("--warmup_steps 1.5", ["--warmup_steps", "1.5", "fraction"]),
    ("--lr_scheduler_kwargs foo", ["--lr_scheduler_kwargs", "mapping", "foo"]),
    ("--gradient_checkpointing_kwargs [1]", ["--gradient_checkpointing_kwargs", "mapping", "[1]"]),
    ("--use_peft false --use_dora true", ["--use_dora", "--use_peft false"]),
    ("--output_dir loop", ["--output_dir", "loop", "cannot be written"]),
    ("--model_name_or_path claims_4bit", ["--model_name_or_path", "claims_4bit", "weights are full"]),
    ("--dry_run --model_name_or_path ./nowhere", ["--model_name_or_path", "./nowhere"]),
    ("--dry_run --segment_length 250", ["--segment_length", "window of 256"]),
    ("--dry_run --task passkeys", ["--task", "passkeys", "did you mean passkey"]),
    ("--dry_run --dataset_name nowhere.jsonl", ["--dataset_name", "nowhere.jsonl", "does not exist", "empty.jsonl"]),
    ("--dry_run --text_path nowhere.txt", ["--text_path", "nowhere.txt", "does not exist"]),
    ("--dry_run --report_to nothing", ["--report_to", "nothing"]),
    ("--dry_run --init_adapter_path run --lora_alpha 3", ["--init_adapter_path", "lora_alpha 8", "`--lora_alpha` 3"]),
    ("--dry_run --init_adapter_path run --num_memory_tokens 2", ["--init_adapter_path", "of shape [4, 64]", "[2, 64]"]),
]  # fmt: skip
LANDMARK = [
    ("--block_length 1", ["--block_length", "2 or more", "got 1"]),
    ("--top_k 0", ["--top_k", "1 or more", "got 0"]),
    ("--train_top_k 0", ["--train_top_k", "1 or more", "got 0"]),
    ("--context_length 60", ["--context_length", "60", "leaves no room", "--top_k"]),
    ("--context_length 300", ["--context_length", "window of 256"]),
    ("--landmark_embedding mean", ["--landmark_embedding", "trained or frozen_mean", "mean"]),
    ("--retrieval row", ["--retrieval", "token or chunk", "row"]),
    ("--implementation fast", ["--implementation", "fast", "sdpa"]),
    ("--segment_length 64", ["unknown flag", "--segment_length"]),
    ("--model_name_or_path no_embeds --attn_implementation eager --load_in_4bit false", ["--model_name_or_path", "llama, mistral"]),
    ("--use_peft false --landmark_embedding frozen_mean", ["--use_peft", "--landmark_embedding", "trains nothing"]),
    ("--curriculum_stages 2", ["--curriculum_stages", "2 × `--context_length` 200", "window of 256"]),
    ("--curriculum_stages 2 --dry_run", ["--curriculum_stages", "window of 256"]),
    ("--task text", ["--task text", "--text_path"]),
    ("--text_path nowhere.txt", ["--text_path", "nowhere.txt", "does not exist"]),
    ("--text_path full/mine.txt", ["--text_path", "mine.txt", "tokens"]),
]  # fmt: skip

LRMT = [
    ("evaluate --adapter_path nowhere --task passkey", ["--adapter_path", "nowhere"]),
    ("evaluate --adapter_path foreign --task passkey --lengths 1", ["--adapter_path", "foreign", "another backbone", "name that one"]),
    ("evaluate --adapter_path half --task passkey --lengths 1", ["--adapter_path", "half", "adapter_model.safetensors"]),
    ("evaluate --adapter_path cut --task passkey --lengths 1", ["--adapter_path", "cut"]),
    ("evaluate --adapter_path run --task passkeys", ["--task", "did you mean passkey"]),
    ("inspect --adapter_path run --task passkey --length 1.5", ["--length takes", "1.5"]),
    ("evaluate --adapter_path run --task passkey --lengths none", ["--lengths", "none"]),
    ("evaluate --adapter_path run --task passkey --lengths 0", ["--lengths", "0"]),
    ("evaluate --adapter_path run --task qa1 --harness babilong_qa1", ["--harness", "stands alone", "--task too"]),
    ("evaluate --adapter_path run --harness babilong_qa1 --num_digits 3 --top_k 2 --split train", ["--split, --num_digits too"]),
    ("evaluate --adapter_path run --harness babilong_qa1 --scoring strict --baseline", ["--baseline, --scoring too"]),
    ("evaluate --adapter_path run --task passkey --api_timeout 0", ["--api_timeout", "more than 0"]),
    ("evaluate --adapter_path run --task qa1 --lengths 400 --background_dir prose.txt", ["--repeat_background", "32,000"]),
    ("evaluate --adapter_path run --dataset_name babi --dataset_split qa1", ["--dataset_split qa1", "--task qa1 --lengths 4k"]),
    ("evaluate --adapter_path run --harness_data nowhere", ["--harness", "--harness_data", "alone"]),
    ("evaluate --adapter_path run --harness babilong_qa1 --harness_data nowhere", ["--harness_data", "nowhere"]),
    ("evaluate --adapter_path run --harness babilong_qa99", ["babilong_qa99", "did you mean"]),
    ("evaluate --adapter_path run --task qa1 --babi_vocabulary prose.txt", ["--scoring official", "--babi_vocabulary", "exact"]),
    ("evaluate --adapter_path run --task qa1 --scoring exact --babi_vocabulary nowhere", ["--babi_vocabulary nowhere", "YAML or JSON"]),
    ("evaluate --adapter_path run --task passkey --baseline rags", ["--baseline", "'rags'", "did you mean rag?"]),
    ("evaluate --adapter_path run --task passkey --baseline api", ["--api_model", "--baseline api alone"]),
    ("evaluate --adapter_path run --task passkey --api_model gpt", ["--baseline api", "--api_model gpt alone"]),
    ("evaluate --adapter_path run --task passkey --depths 50", ["--depths", "50.0", "[0, 1]"]),
    ("evaluate --adapter_path run --task passkey --stop_below 5", ["--stop_below", "5.0", "(0, 1]"]),
    ("evaluate --adapter_path run --task passkey --rag_chunks words", ["--rag_chunks", "'words'", "sentences"]),
    ("evaluate --adapter_path run --task passkey --rag_top_k 0", ["--rag_top_k", "0", "at least 1"]),
    ("evaluate --adapter_path run --task passkey --rag_order date", ["--rag_order", "'date'", "document"]),
    ("evaluate --adapter_path run --task passkey --lengths 0k", ["does not fit into 0 tokens"]),
    ("evaluate --adapter_path run --dataset_name long.jsonl", ["--segment_length", "long.jsonl row 2"]),
    ("evaluate --adapter_path run --dataset_name column.jsonl", ["column.jsonl row 1", "'target'"]),
    ("data build --task qa1 --lengths 1k --output_dir new --background_dataset nowhere.jsonl", ["--background_dataset"]),
    ("data show --task qa1 --lengths 4k --index -1", ["--index", "-1"]),
    ("evaluate --adapter_path run --task qa1 --background_dir full --background_dataset a/b", ["--background_dataset", "Name one"]),
    ("evaluate --adapter_path run --task passkey --lengths 2 --passkey_wording rular", ["--passkey_wording", "rular", "longlora"]),
    ("evaluate --adapter_path run --task perplexity --text_path prose.txt --depths 0.5", ["--task perplexity", "--depths too"]),
    ("evaluate --adapter_path run --task perplexity --text_path prose.txt --stop_below 0.5", ["stands alone", "--stop_below too"]),
    ("evaluate --adapter_path run --dataset_name column.jsonl --stop_below 0.5", ["--dataset_name", "leave out --stop_below"]),
    ("merge --adapter_path nowhere --output_dir new", ["--adapter_path", "nowhere", "no such folder"]),
    ("merge --adapter_path empty_folder --output_dir new", ["--adapter_path", "empty_folder", "missing"]),
    ("merge --adapter_path half --output_dir new", ["--adapter_path", "half", "adapter_model.safetensors missing"]),
    ("merge --adapter_path cut --output_dir new", ["--adapter_path", "cut"]),
    ("merge --adapter_path foreign --output_dir new", ["--adapter_path", "another backbone"]),
    ("merge --adapter_path merged --output_dir new", ["--adapter_path", "merged", "merged checkpoint already", "name an adapter"]),
    ("merge --adapter_path run --output_dir loop", ["--output_dir", "loop", "cannot be written"]),
    ("evaluate --adapter_path run --dataset_name shards --task qa1 --lengths 4k", ["row 3 of", "shards/4k/qa1.jsonl", "'target'"]),
    ("merge --adapter_path run --output_dir full", ["--output_dir", "full", "not empty", "another"]),
    ("merge --adapter_path run --output_dir new --merge_base int4", ["--merge_base", "int4", "nf4_roundtrip"]),
    ("score nowhere", ["FOLDER", "nowhere", "must be a folder"]),
    ("score full --output_dir new", ["FOLDER", "full", "no .csv file", "qa1_4k_"]),
    ("score . --output_dir new", ["rows.csv", "not named after a cell", "rename it"]),
    ("score predictions --output_dir new", ["predictions/qa1_4k_", "no column 'question'", "target, output, question"]),
    ("score labels --output_dir new", ["qa1_4k_", "row 1", "'cellar'", "bathroom", "correct it"]),
    ("score cut_predictions --output_dir new", ["cut_predictions/qa1_4k_", "is empty", "write the cell again"]),
    ("report nowhere --output_dir new", ["nowhere", "cannot be read", "results.json"]),
    ("report full --output_dir new", ["full", "no results.json or scores.json", "mine.txt"]),
    ("report empty.jsonl --output_dir new", ["empty.jsonl", "not JSON", "write it again"]),
    ("score labels --output_dir full/mine.txt", ["--output_dir", "full/mine.txt", "must be a folder"]),
]  # fmt: skip
DATA = [
    ("--task qa21", ["--task", "'qa21'", "did you mean qa2"]),
    ("--lengths four", ["--lengths", "'four'", "4k"]),
    ("--lengths 300", ["--lengths 300", "--reserved_tokens 300", "ask for more"]),
    ("--lengths 310", ["qa1", "fits into 10 tokens", "greater length"]),
    ("--output_dir full", ["--output_dir", "full", "not empty", "another"]),
    ("--output_dir full/mine.txt", ["--output_dir", "must be a folder"]),
    ("--format csv", ["--format", "'csv'", "parquet, jsonl, chat"]),
    ("--split valid", ["--split", "'valid'", "did you mean validation"]),
    ("--num_samples 0", ["--num_samples", "at least 1", "got 0"]),
    ("--num_workers 0", ["--num_workers", "at least 1", "got 0"]),
    ("--seed -1", ["--seed", "-1"]),
    ("--question_position first", ["--question_position", "--format chat"]),
    ("--max_n_facts 0", ["--max_n_facts", "1 or more", "got 0"]),
    ("--depth 2", ["--depth", "[0, 1]", "2.0"]),
    ("--task_start_pct 0.9 --task_end_pct 0.1", ["--task_start_pct", "0.9"]),
    ("--tokenizer ./nowhere", ["--tokenizer", "./nowhere", "folder"]),
    ("--background_dir nowhere", ["--background_dir", "nowhere"]),
    ("--lengths 1k --background_dir book.txt", ["book.txt", "700", "--repeat_background"]),
    ("--background_dataset a/b", ["exclude", "a/b"]),
    ("--babi_dir label", ["qa1_test.txt", "'cellar'", "no label of qa1"]),
    ("--babi_dir empty_folder", ["--babi_dir", "empty_folder"]),
]  # fmt: skip


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()} | {
        path: None for path in folder.rglob("*") if path.is_dir()
    }


def check(world, capfd, call, expected):
    before = snapshot(world)
    try:
        with pytest.raises(SystemExit) as stop:
            call()
    finally:
        after = snapshot(world)
        shutil.rmtree(world / "new", ignore_errors=True)  # or one failure is many
    error = capfd.readouterr().err.rstrip("\n").split("\n")
    assert stop.value.code == 2, error
    assert error[-1].startswith("lrmt: error: "), error
    assert [line for line in error if "lrmt:" in line] == error[-1:]
    for text in expected:
        assert text in error[-1]
    assert after == before


@pytest.mark.parametrize(("command", "expected"), TRAIN, ids=[command for command, _ in TRAIN])
def test_training(world, backbones, run_recipe, small_flags, monkeypatch, capfd, command, expected):
    monkeypatch.chdir(world)
    flags = [*small_flags, "--save_steps", "3", "--model_name_or_path", backbones["llama"], "--output_dir", "new"]
    flags += [str(backbones["mistral"]) if flag == "MISTRAL" else flag for flag in command.split()]

    def call():
        with exit_on_error():
            run_recipe("rmt_llama", *flags)

    check(world, capfd, call, expected)


@pytest.mark.parametrize(("command", "expected"), LANDMARK, ids=[command for command, _ in LANDMARK])
def test_training_of_landmarks(world, backbones, run_recipe, monkeypatch, capfd, command, expected):
    monkeypatch.chdir(world)
    small = "--block_length 16 --context_length 200 --top_k 2 --num_digits 2 --stage_max_steps 2 --eval_samples 4"
    flags = [*small.split(), "--model_name_or_path", backbones["llama"], "--output_dir", "new", *command.split()]

    def call():
        with exit_on_error():
            run_recipe("landmark_llama", *flags)

    check(world, capfd, call, expected)


@pytest.mark.parametrize(("command", "expected"), LRMT, ids=[command for command, _ in LRMT])
def test_lrmt(world, monkeypatch, capfd, command, expected):
    monkeypatch.chdir(world)
    check(world, capfd, lambda: cli.main(command.split()), expected)


@pytest.mark.parametrize(("command", "expected"), DATA, ids=[command for command, _ in DATA])
def test_data(world, monkeypatch, capfd, command, expected):
    monkeypatch.chdir(world)
    good = "data build --task qa1 --lengths 4k --output_dir new --background_dir prose.txt"
    check(world, capfd, lambda: cli.main([*good.split(), *command.split()]), expected)


def test_the_row_that_is_right_trains(world, backbones, run_recipe, small_flags, tmp_path, monkeypatch):
    """The table's own flags are good: what fails is each row's mistake."""
    monkeypatch.chdir(world)
    flags = ["--curriculum_stages", "1", "--stage_max_steps", "1", "--output_dir", tmp_path / "new"]
    run_recipe("rmt_llama", *small_flags, "--model_name_or_path", backbones["llama"], *flags)
    arguments = yaml.safe_load((tmp_path / "new" / "arguments.yaml").read_text())
    assert arguments["segment_length"] == 80
    assert torch.is_tensor(torch.load(tmp_path / "new" / "checkpoint-1" / "rng_state.pth", weights_only=False)["cpu"])
