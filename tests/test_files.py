"""One reader of text: UTF-8 whatever the locale, or one line that says which byte is not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lrmt.errors import UsageError
from lrmt.files import filling, read_text

ROOT = Path(__file__).parents[1]
TEXT = "Łódź, 厨房, cafe\u0301"


@pytest.mark.parametrize("content", [TEXT.encode(), TEXT.encode("utf-8-sig"), b""])
def test_text_is_utf8_and_a_bom_is_none(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt", "--input") == (TEXT if content else "")


def test_every_end_of_a_line_is_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a.txt", "--input") == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a café".encode("latin-1"),
            "a.txt is not UTF-8 text (byte 5); convert it: iconv -f ENCODING -t UTF-8 FILE > NEW",
        ),
        ("厨房里".encode("gbk"), "a.txt is not UTF-8 text (byte 0); convert it: iconv -f ENCODING"),
        (
            "Nora".encode("utf-16"),
            "a.txt is not UTF-8 text (byte 0), but UTF-16 or no text; convert it: iconv -f UTF-16",
        ),
        ("Nora".encode("utf-16-le"), "a.txt is not UTF-8 text (byte 1), but UTF-16 or"),
        (b"\xef\xbb\xbfNo\xffra", "a.txt is not UTF-8 text (byte 5); convert"),
    ],
)
def test_another_encoding_is_refused_with_its_byte(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_text(tmp_path / "a.txt", "--input")
    assert message in str(caught.value) and str(caught.value).startswith("--input ")


def test_what_cannot_be_read_is_one_line(tmp_path):
    for path, message in ((tmp_path / "gone", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=rf"^--input {path} cannot be read \({message}\); name a text file$"):
            read_text(path, "--input")


def test_the_locale_does_not_matter(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    code = f"from lrmt.files import filling, read_text; print(ascii(read_text({str(tmp_path / 'a.txt')!r}, '--input')))"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == f"{ascii(TEXT)}\n", done.stderr


def test_every_text_file_is_opened_as_utf8():
    """Or the locale decides; a call that names no encoding reads or writes bytes."""
    calls = ("open", "read_text", "write_text")
    for path in (file for room in ("tasks", "data") for file in (ROOT / "lrmt" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (getattr(node.func, "id", "") or getattr(node.func, "attr", "")) in calls:
                named = {word.arg for word in node.keywords}
                ours = getattr(node.func, "id", "") == "read_text"
                assert ours or "encoding" in named, f"{path}:{node.lineno}"


def test_a_folder_inside_is_replaced_with_what_it_holds(tmp_path):
    """Tokenizers keep further chat templates in a folder of their own."""
    for text in ("first", "second"):
        with filling(tmp_path / "out", last="config.json") as temporary:
            (temporary / "templates").mkdir()
            (temporary / "templates" / f"{text}.jinja").write_text(text)
            (temporary / "config.json").write_text(text)
    assert [path.name for path in (tmp_path / "out" / "templates").iterdir()] == ["second.jinja"]
    assert (tmp_path / "out" / "config.json").read_text() == "second"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_remedy_for_wide_text_names_its_encoding(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Call me Nora.".encode(encoding))
    named = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    with pytest.raises(UsageError, match=f"iconv -f {named} "):
        read_text(tmp_path / "a.txt", "--input")
