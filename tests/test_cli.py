"""The command line: bad input is one line and exit code 2, and writes nothing."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

import lrmt
from lrmt.cli import main
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


@pytest.mark.parametrize("command", ["evaluate", "merge", "score", "report", "data build", "data show"])
def test_help_shows_every_flag_and_an_example(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"  lrmt {command} " in out
    assert max(map(len, out.splitlines())) <= 120


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
