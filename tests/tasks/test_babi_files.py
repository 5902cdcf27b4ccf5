import pytest

from lrmt.errors import UsageError
from lrmt.tasks import babi


def test_read_drops_questions_and_maps_support_to_facts(tmp_path):
    path = tmp_path / "qa2_train.txt"
    path.write_text(
        "1 Mary moved to the office.\n2 Mary got the milk there.\n3 Where is Mary? \toffice\t1\n"
        "4 Mary dropped the milk.\n5 Where is the milk? \toffice\t4 1\n"
        "1 John went to the garden.\n2 Where is John? \tgarden\t1\n"
    )
    first, second, third = babi.read(path)
    assert first == babi.BabiSample(
        ("Mary moved to the office.", "Mary got the milk there."), "Where is Mary? ", "office", (0,)
    )
    assert second.facts == (*first.facts, "Mary dropped the milk.")
    assert second.support == (2, 0)
    assert third == babi.BabiSample(("John went to the garden.",), "Where is John? ", "garden", (0,))


def test_read_refuses_what_is_no_babi_file(tmp_path):
    (tmp_path / "qa7_train.txt").write_text("")
    with pytest.raises(UsageError, match="holds: qa7_train.txt"):
        babi.read(tmp_path / "qa1_train.txt")
    with pytest.raises(UsageError, match="holds no question"):
        babi.read(tmp_path / "qa7_train.txt")
    for text, message in (
        ("Call me Ishmael.", r"bad.txt:1: expected `<id> <sentence>`"),
        ("1 Mary went to the office.\n2 Where is Mary? \toffice\t7", r"bad.txt:2: expected `question<TAB>answer"),
        ("1 Mary went to the office.\n2 Where is Mary? \toffice", r"bad.txt:2: expected `question<TAB>answer"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(UsageError, match=message):
            babi.read(tmp_path / "bad.txt")


def test_a_bom_is_no_text_and_other_encodings_are_refused(tmp_path):
    story = "1 Zoë moved to the office.\n2 Where is Zoë? \toffice\t1\n"
    path = tmp_path / "qa1_train.txt"
    path.write_text(story, encoding="utf-8")
    plain = babi.read(path)
    for content in (story.encode("utf-8-sig"), story.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert babi.read(path) == plain
    for encoding, byte in (("latin-1", 4), ("utf-16", 0)):
        path.write_bytes(story.encode(encoding))
        with pytest.raises(UsageError, match=rf"--babi_dir .*qa1_train.txt is not UTF-8 text \(byte {byte}\).*iconv"):
            babi.read(path)


@pytest.mark.realdata
def test_read_finds_every_question_of_every_official_task(data_dir):
    for number in range(1, 21):
        samples = babi.read(data_dir / "babi" / f"qa{number}_valid.txt")
        assert len(samples) == (data_dir / "babi" / f"qa{number}_valid.txt").read_text().count("?")
        assert all(s.answer and s.facts and max(s.support) < len(s.facts) for s in samples)
