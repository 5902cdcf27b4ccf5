"""The command line: bad input is one line and exit code 2, and writes nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

import lrmt
from lrmt.cli import main
from lrmt.errors import UsageError
from lrmt.evaluation.results import ResultsFolder
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.files import fingerprint
from lrmt.tasks import prose

ADAPTER = "ADAPTER"


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    return folder


def run(capsys, *argv):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "command"),
        ("evalute", "did you mean evaluate?"),
        ("evaluate", "--adapter_path"),
        ("evaluate --adaptor_path x --task qa1", "did you mean --adapter_path?"),
        ("evaluate --adapter_path ADAPTER --task qa1 --length 1", "did you mean --lengths?"),
        ("evaluate --adapter_path ADAPTER --task qa1 --len=1", "no flag --len"),
        ("evaluate --adapter_path nowhere --task qa1", "--adapter_path must be a folder"),
        ("evaluate --adapter_path . --task qa1", "no config.json"),
        ("evaluate --adapter_path ADAPTER --task qa1", "llama, not an lrmt model"),
        ("evaluate --adapter_path ADAPTER", "--task"),
        ("evaluate --adapter_path ADAPTER --task passkeys", "did you mean passkey?"),
        ("evaluate --adapter_path ADAPTER --task qa21", "'qa21'"),
        ("evaluate --adapter_path ADAPTER --task qa1 --lengths 1 two", "--lengths"),
        ("evaluate --adapter_path ADAPTER --task qa1 --lengths 0", "--lengths"),
        ("evaluate --adapter_path ADAPTER --task qa1 --lengths -4", "--lengths"),
        ("evaluate --adapter_path ADAPTER --task qa1 --num_samples 0", "--num_samples must be at least 1; got 0"),
        ("evaluate --adapter_path ADAPTER --task qa1 --num_samples many", "--num_samples"),
        ("evaluate --adapter_path ADAPTER --task qa1 --batch_size 0", "--batch_size"),
        ("evaluate --adapter_path ADAPTER --task qa1 --seed -1", "--seed"),
        ("evaluate --adapter_path ADAPTER --task qa1 --seed 18446744073709551616", "--seed must be less than"),
        ("data", "name a command; see lrmt data --help"),
        ("evaluate --adapter_path ADAPTER --task qa1 --overwrite perhaps", "invalid bool value: 'perhaps'"),
        ("evaluate --adapter_path ADAPTER --task qa1 --split tests", "did you mean test?"),
        ("evaluate --adapter_path ADAPTER --task qa1 --scoring oficial", "did you mean official?"),
        ("evaluate --adapter_path ADAPTER --task qa1 --babi_dir nowhere", "--babi_dir"),
        ("evaluate --adapter_path ADAPTER --task qa1 --background_dir ADAPTER", "no .txt file"),
        ("evaluate --adapter_path ADAPTER --task qa1 --output_dir ADAPTER/config.json", "--output_dir"),
        ("evaluate --adapter_path ADAPTER --dataset_name missing.jsonl", "missing.jsonl does not exist"),
        ("evaluate --adapter_path ADAPTER --dataset_name x.jsonl --task qa1 --lengths 4k", "x.jsonl does not exist"),
        ("score", "FOLDER"),
        ("score nowhere", "FOLDER must be a folder"),
        ("score ADAPTER --outputdir x", "did you mean --output_dir?"),
        ("report", "PATH"),
        ("report ADAPTER --name x", "did you mean --names?"),
        ("data", "command"),
        ("data biuld --task qa1", "did you mean build?"),
        ("data build --tasks qa1", "did you mean --task?"),
        ("data build --task qa1 --lengths 4k", "--output_dir"),
        ("merge --adapter_path ADAPTER", "--output_dir"),
        ("merge --adapter_path ADAPTER --output_dir out --merge_base nf4", "--merge_base"),
    ],
)
def test_bad_input_is_one_line(adapter, tmp_path, capsys, command, message):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *command.replace(ADAPTER, str(adapter)).split())
    assert code == 2
    assert out == ""
    assert err.startswith("lrmt: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_configuration_that_is_not_json_is_one_line(adapter, capsys):
    (adapter / "config.json").write_text("{")
    code, _, err = run(capsys, "evaluate", "--adapter_path", str(adapter), "--task", "qa1")
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json" in err


def test_flags_reach_the_settings(adapter, capsys, monkeypatch):
    from lrmt.evaluation import run as module

    seen = []
    monkeypatch.setattr(module, "run_evaluation", seen.append)
    flags = (
        "--task qa1 qa2 --lengths 1 4k --num_samples 7 --scoring strict --no_load_in_4bit --overwrite --output_dir o"
    )
    assert run(capsys, "evaluate", "--adapter_path", str(adapter), *flags.split())[0] == 0
    (settings,) = seen
    assert (settings.task, settings.lengths) == (("qa1", "qa2"), ("1", "4k"))
    assert (settings.num_samples, settings.scoring, settings.load_in_4bit) == (7, "strict", False)
    assert (settings.overwrite, str(settings.folder)) == (True, "o")
    assert run(capsys, "evaluate", "--adapter_path", str(adapter), "--task", "passkey")[0] == 0
    assert seen[1].load_in_4bit is None
    assert seen[1].folder == adapter / "evaluation"


def test_merge_prints_both_gaps(capsys, monkeypatch):
    module = SimpleNamespace(merge_adapter=lambda *args: seen.append(args) or {"same_base": 2e-6, "as_trained": 0.03})
    monkeypatch.setitem(sys.modules, "lrmt.publishing.merge", module)
    seen = []
    code, out, _ = run(capsys, "merge", "--adapter_path", "a", "--output_dir", "b", "--merge_base", "nf4_roundtrip")
    assert (code, seen) == (0, [("a", "b", "nf4_roundtrip")])
    assert "2.0e-06" in out
    assert "3.0e-02" in out


def test_interruption_is_not_a_traceback(adapter, capsys, monkeypatch):
    from lrmt.evaluation import run as module

    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_evaluation", interrupted)
    code, _, err = run(capsys, "evaluate", "--adapter_path", str(adapter), "--task", "passkey")
    assert code == 130
    assert err.count("\n") == 1


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"lrmt {lrmt.__version__}\n")


def test_data_is_built_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("\n".join(prose.write(200, 0)))
    what = ["--task", "qa1", "memorize", "--background_dir", str(tmp_path / "book.txt"), "--lengths", "0k", "1k"]
    code, out, _ = run(capsys, "data", "build", *what, "--num_samples", "2", "--output_dir", str(tmp_path / "out"))
    assert code == 0 and out.startswith("4 files are in") and 'split="qa1")' in out
    names = ["memorize-00000-of-00001.parquet", "qa1-00000-of-00001.parquet"]
    assert [p.name for p in sorted((tmp_path / "out" / "1k").iterdir())] == names
    code, out, _ = run(capsys, "data", "show", *what[:6], "1k", "--full")
    assert code == 0 and out.startswith("qa1 1k, test sample 0: 700 tokens")
    (row, *_) = pq.read_table(tmp_path / "out" / "1k" / names[1]).to_pylist()
    assert row["input"] in out.replace("[[", "").replace("]]", "")


@pytest.mark.parametrize("command", ["evaluate", "inspect", "merge", "score", "report", "data build", "data show"])
def test_help_shows_every_flag_and_an_example(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"  lrmt {command} " in out
    assert max(map(len, out.splitlines())) <= 120


MODES = {
    "": (["lengths", "baselines"], ["--task", "--babi_dir", "--depths", "--rag_chunks", "--scoring"], ["--text_path", "--harness"]),
    "--dataset_name x": (["baselines"], ["--dataset_split", "--api_model", "--scoring"], ["--lengths", "--depths", "--num_digits"]),
    "--task perplexity": (["lengths", "baselines"], ["--text_path", "--lengths", "--baseline"], ["--rag_chunks", "--scoring"]),
    "--harness": (["lengths"], ["--harness_data", "--harness_prompt", "--lengths"], ["--task", "--split", "--baseline"]),
}  # fmt: skip


@pytest.mark.parametrize("flags", MODES)
def test_each_mode_has_a_help_of_its_own_in_groups(capsys, flags):
    code, out, _ = run(capsys, "evaluate", *flags.split(), "--help")
    groups, offered, others = MODES[flags]
    lines = out.splitlines()
    titles = [line.removesuffix(":") for line in lines if re.fullmatch(r"[a-z]+:", line) and "example" not in line]
    assert code == 0 and titles == ["options", "method", "task", *groups, "output"]
    shown = {line.split()[0] for line in lines if line.startswith("  --")}
    assert {"--adapter_path", "--model_name_or_path", "--output_dir", *offered} <= shown and not shown & {*others}
    assert "lrmt evaluate --adapter_path DIR --help" in out  # tells the flags of how it reads
    assert max(map(len, lines)) <= 125


def test_how_a_model_reads_is_told_by_its_method(adapter, capsys):
    for method, config in (("landmark", {"top_k": 9}), ("rmt", {})):
        (adapter / "config.json").write_text(json.dumps({"model_type": method} | config))
        for command in ("evaluate", "inspect"):
            code, out, _ = run(capsys, command, "--adapter_path", str(adapter), "--help")
            out = " ".join(out.split())
            assert code == 0 and ("reading (landmark): --top_k" in out) == (method == "landmark")
            assert ("at inference. (default: 9)" in out) == (method == "landmark")
    code, _, err = run(capsys, "evaluate", "--adapter_path", str(adapter), "--task", "qa1", "--top_k", "2")
    assert (code, err) == (
        2, "lrmt: error: `--top_k` is no setting of how a rmt model reads (known: none); leave it out\n"
    )  # fmt: skip


def test_flags_of_the_method_reach_the_settings(adapter, capsys, monkeypatch):
    from lrmt.evaluation import run as module

    seen = []
    monkeypatch.setattr(module, "run_evaluation", seen.append)
    (adapter / "config.json").write_text('{"model_type": "landmark"}')
    command = ["evaluate", "--adapter_path", str(adapter), "--task", "passkey"]
    flags = "--top_k 3 --offload_blocks --model_name_or_path elsewhere/llama --no-load-in-4bit"
    assert run(capsys, *command, *flags.split())[0] == 0
    assert seen[0].reading == {"top_k": 3, "offload_blocks": True}
    assert (seen[0].model_name_or_path, seen[0].load_in_4bit) == ("elsewhere/llama", False)
    for wrong, message in (
        ("--top_l 3", "did you mean --top_k?"),
        ("--retrieval row", "must be token or chunk; got row"),
    ):
        code, _, err = run(capsys, *command, *wrong.split())
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("method", ["rmt", "landmark", "llama"])
def test_a_folder_from_before_is_the_same_evaluation(adapter, method):
    """Keys and values of settings.json are those of before; a setting that changes no answer is none of them."""
    (adapter / "config.json").write_text(json.dumps({"model_type": method}))
    of_texts = {"babi_dir": None, "babi_vocabulary": None, "background_dir": None, "background_dataset": None}
    of_rows = {"dataset_name": None, "dataset_config": None, "dataset_split": None, "text_path": None}
    of_passkey = {"num_digits": 4, "passkey_wording": "plain"}
    before = {
        "adapter": fingerprint(adapter), "num_samples": 7, "seed": 1, "split": "test", "scoring": "strict", "load_in_4bit": None,
        "top_k": None, "retrieval": None, **of_texts, **of_rows, **of_passkey, "question_position": "last", "max_n_facts": None,
        "version": lrmt.__version__,
    }  # fmt: skip
    out = adapter.parent / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps(before))
    (out / "results.json").write_text("[]")

    def resumed(**reading):
        given = {"num_samples": 7, "seed": 1, "scoring": "strict", "num_digits": 4, "reading": reading}
        settings = EvaluationSettings(str(adapter), task=("passkey",), **given)
        later = {"model_name_or_path": None} | reading
        assert before.items() >= {k: v for k, v in settings.identity().items() if k not in later}.items()
        return ResultsFolder(out, settings.identity(), defaults=settings.defaults()).resumed

    assert resumed()
    if method == "landmark":
        assert resumed(offload_blocks=True)
        with pytest.raises(UsageError, match="top_k null, now 2"):
            resumed(top_k=2)
        (out / "settings.json").write_text(json.dumps(before | {"top_k": 2}))
        assert resumed(top_k=2)
        with pytest.raises(UsageError, match="top_k 2, now null"):
            resumed()


def test_an_adapter_of_the_hub(adapter, capsys, monkeypatch):
    """It is found where `lrmt.load` finds it, and its results do not go into the cache."""
    from lrmt.adapters import find
    from lrmt.evaluation import inspect
    from lrmt.evaluation import run as module

    seen = []
    monkeypatch.setattr(find, "_download", lambda name, *_: seen.append(name) or adapter)
    monkeypatch.setattr(module, "run_evaluation", seen.append)
    monkeypatch.setattr(inspect, "run_inspection", seen.append)
    command = ["evaluate", "--adapter_path", "someone/memory", "--task", "passkey"]
    assert run(capsys, *command)[0] == 0
    assert (seen[0], seen[1].adapter_path, seen[1].adapter_name) == ("someone/memory", str(adapter), "memory")
    assert seen[1].folder == Path("runs/memory/evaluation") and seen[1].identity()["adapter"] == fingerprint(adapter)
    (adapter.parent / "book.txt").write_text("A text.")
    assert run(capsys, "inspect", "--adapter_path", "someone/memory", "--input", "book.txt")[0] == 0
    assert seen[3].folder == Path("runs/memory/inspection")
    assert run(capsys, *command, "--seed", "-1")[0] == 2 and len(seen) == 4  # what is wrong shows before a download
    assert list(adapter.parent.rglob("runs")) == []


def test_another_place_of_the_backbone_reaches_merge(capsys, monkeypatch):
    seen = []
    gaps = {"same_base": 0.0, "as_trained": 0.0}
    module = SimpleNamespace(merge_adapter=lambda *args, **named: seen.append((args, named)) or gaps)
    monkeypatch.setitem(sys.modules, "lrmt.publishing.merge", module)
    flags = ["--adapter_path", "a", "--output_dir", "b", "--model_name_or_path", "elsewhere"]
    assert run(capsys, "merge", *flags)[0] == 0
    assert seen == [(("a", "b", "original"), {"model_name_or_path": "elsewhere"})]


def test_what_the_terminal_cannot_show_is_no_traceback(tmp_path):
    (tmp_path / "é").mkdir()
    program = [sys.executable, "-m", "lrmt.cli"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    for flags, code in ((["evaluate", "--help"], 0), (["score", "é"], 2)):
        done = subprocess.run([*program, *flags], capture_output=True, env=env, cwd=tmp_path)
        assert done.returncode == code and b"Traceback" not in done.stderr
        (done.stdout + done.stderr).decode("ascii")
    assert b"qa1, ? qa20" in subprocess.run([*program, "evaluate", "--help"], capture_output=True, env=env).stdout


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from lrmt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.perf_counter() - start < 5  # a tenth of a second on an idle machine
