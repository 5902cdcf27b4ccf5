"""Where things are: folders and Hub ids, and one line for each way in which there is nothing to open."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lrmt
from lrmt.adapters.find import check_files, check_whole, find_adapter, find_backbone, is_hub_id, resolve_backbone
from lrmt.errors import UsageError

ASSETS = Path(lrmt.__file__).parent / "assets"
ADAPTER = ASSETS / "rmt-qa1"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that has `people/qa1` alone."""
    import huggingface_hub

    def download(hub_id, **options):
        if hub_id != "people/qa1":
            raise OSError(f"404: {hub_id}\nis not here")
        return shutil.copytree(ADAPTER, tmp_path / "cache", dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)


def test_folder_and_hub_id(hub, tmp_path):
    assert find_adapter(ADAPTER) == find_adapter(str(ADAPTER)) == ADAPTER
    assert find_adapter("people/qa1") == tmp_path / "cache"
    assert lrmt.load("people/qa1").config.model_type == "rmt"


def test_folder_wins_over_the_hub(hub, tmp_path):
    folder = shutil.copytree(ADAPTER, tmp_path / "people" / "qa1")
    assert find_adapter("people/qa1").resolve() == folder


@pytest.mark.parametrize("flag", ["--adapter_path", "`--init_adapter_path`"])
def test_one_slash_is_told_as_folder_and_as_hub_id(hub, flag):
    with pytest.raises(UsageError) as told:
        find_adapter("models/tiny", flag)
    assert str(told.value).startswith(f"{flag} models/tiny is no adapter: no such folder, and the Hub says: 404")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"must be a folder that training or merging wrote, or a Hub id; got nowhere.*no such folder"),
        ("a/b/c", "no such folder"),
        ("../a", "no such folder"),
        ("x" * 5000, "cannot be read .File name too long"),
    ],
)
def test_nothing_there(hub, name, message):
    with pytest.raises(UsageError, match=message):
        find_adapter(name)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "config.json"])
def test_half_an_adapter(tmp_path, name):
    folder = shutil.copytree(ADAPTER, tmp_path / "half")
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"not a whole adapter, {name} missing"):
        check_whole(find_adapter(folder))


def test_hub_ids():
    assert is_hub_id("people/qa1") and is_hub_id("Qwen/Qwen2.5-0.5B")
    assert not any(map(is_hub_id, ["qa1", "./qa1", "/a/b", "~/qa1", "a/b/c", "../qa1", "-a/b", "a b/c"]))
    with pytest.raises(UsageError, match="cannot be read .File name too long"):
        resolve_backbone("x" * 5000)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(tmp_path, name):
    folder = shutil.copytree(ASSETS / "tiny-llama", tmp_path / "lfs")
    (folder / name).write_text(POINTER)
    with pytest.raises(UsageError, match=f"{name} is a pointer of git-lfs.*git lfs pull.*name a folder"):
        check_files(folder, "--flag")
    if name == "model.safetensors":
        check_files(folder, "--flag", weights=False)


def test_weights_that_were_cut_off(tmp_path):
    folder = shutil.copytree(ASSETS / "tiny-llama", tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="model.safetensors is cut off.*download it again"):
        check_files(folder, "--flag")
    check_files(folder, "--flag", weights=False)
    check_files("organisation/model", "--flag")


def test_relative_backbone_is_found_from_elsewhere(tmp_path, monkeypatch):
    """Training ran in `project`; the adapter is opened from another folder."""
    backbone = shutil.copytree(ASSETS / "tiny-llama", tmp_path / "project" / "models" / "tiny")
    adapter = tmp_path / "project" / "runs" / "one" / "checkpoint-8"
    adapter.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    assert find_backbone(adapter, "models/tiny") == "models/tiny"
    monkeypatch.chdir(tmp_path)
    assert find_backbone(adapter, "models/tiny") == str(backbone)
    assert find_backbone(adapter, "tiny-llama") == "tiny-llama"
    assert find_backbone(adapter, "people/model") == "people/model"  # on the Hub
    for name in ("models/other/tiny", None, 5):
        with pytest.raises(UsageError, match="say where it is with `--model_name_or_path`"):
            find_backbone(adapter, name)


def test_finding_imports_nothing_heavy():
    code = (
        "import sys\nfrom lrmt.adapters.find import find_adapter\n"
        f"find_adapter({str(ADAPTER)!r})\n"
        "print(sorted({'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]
