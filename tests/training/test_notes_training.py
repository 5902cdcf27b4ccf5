"""Notes in training: a mean over the step's tokens whoever has them, logged by age, and refused where there are none."""

import json
import re

import pytest
import torch

from lrmt.errors import UsageError
from lrmt.models.notes import NotesScore
from lrmt.models.weights import in_use
from lrmt.tasks.base import Example, Note, Pieces
from lrmt.training.notes import NotesMeter, collate_notes

NOTES = ["--notes_weight", "1", "--memory_handover", "aligned", "--vary_lengths", "false"]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_the_mean_is_over_the_step_however_it_is_cut(train_small, fp32_flags):
    """The sooner a text tells its key the more there is to note: micro-batches differ in how much they have."""
    flags = [*fp32_flags, *NOTES, "--early_facts_share", "0", "--stage_max_steps", "3", "--curriculum_stages", "3"]
    runs = [
        train_small(*flags, "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", parts)
        for rows, parts in (("4", "1"), ("2", "2"), ("1", "4"))
    ]
    texts = [runs[0].train_task.example(index, 3 * 80) for index in range(8)]
    told = [sum(e.notes[1].end <= end for end in (80, 160)) for e in texts]  # at how many hand-overs
    assert len({sum(told[start : start + 2]) for start in range(0, 8, 2)}) > 1
    for run in runs[1:]:
        for key in ("loss", "grad_norm", "notes_loss", "notes_accuracy", "eval_notes_accuracy"):
            assert logged(run, key) == pytest.approx(logged(runs[0], key), rel=1e-4), key
    plain = train_small(*flags, "--notes_weight", "0")
    assert logged(plain, "loss") != pytest.approx(logged(runs[0], "loss"), rel=0.1) and not logged(plain, "notes_loss")


def test_the_mean_is_a_mean_with_passed_memories_too(train_small, fp32_flags):
    """What state passing adds to the notes weighs no more than what is there."""
    flags = [*fp32_flags, *NOTES, "--curriculum_stages", "3", "3", "--stage_max_steps", "2", "--learning_rate", "0"]
    with_notes, without = (train_small(*flags, "--state_passing", "1", "--notes_weight", w) for w in ("1", "1e-12"))
    losses, plain = logged(with_notes, "loss"), logged(without, "loss")
    told = logged(with_notes, "notes_loss")
    # the same texts and, at a rate of 0, the same weights, for with notes M_0 begins with EOS:
    # from the second stage on they begin from other texts' memories
    assert [a - b for a, b in zip(losses, plain, strict=True)] == pytest.approx(told, rel=1e-4)


def test_each_stage_has_its_weight(train_small, fp32_flags):
    flags = [*fp32_flags, *NOTES, "--curriculum_stages", "2", "2", "--stage_max_steps", "1", "--learning_rate", "0"]
    full, first = (train_small(*flags, "--notes_weight", *weights) for weights in (["1", "1"], ["1", "0"]))
    assert logged(full, "loss")[0] == logged(first, "loss")[0]
    difference = logged(full, "loss")[1] - logged(first, "loss")[1]
    assert difference == pytest.approx(logged(full, "notes_loss")[1], rel=1e-4)
    assert logged(first, "notes_loss")[1] == pytest.approx(logged(full, "notes_loss")[1])  # told all the same


def test_what_is_logged(train_small, fp32_flags, capsys):
    trainer = train_small(*fp32_flags, *NOTES, "--curriculum_stages", "4", "--stage_max_steps", "2")
    entry = next(e for e in trainer.state.log_history if "eval_notes_accuracy_0" in e)
    assert {f"eval_notes_accuracy{since}" for since in ("", "_0", "_1", "_2_3")} <= entry.keys()
    out = capsys.readouterr().out
    assert "hand-over aligned: " in out and "notes_loss" in out and "eval_notes_accuracy" in out


def test_that_notes_are_cut_is_said_once(train_small, fp32_flags, capsys):
    train_small(*fp32_flags, *NOTES, "--num_memory_tokens", "2", "--stage_max_steps", "3", "--eval_samples", "2")
    out = capsys.readouterr().out
    assert out.count("notes are cut to 2 tokens, which the memory has; `--num_memory_tokens` makes room for more") == 1


def test_the_map_is_saved_and_resumed(train_small, fp32_flags, tmp_path):
    import lrmt

    flags = [*fp32_flags, *NOTES, "--stage_max_steps", "2", "--save_steps", "1", "--output_dir", tmp_path / "run"]
    whole = train_small(*flags)
    model = lrmt.load(tmp_path / "run")
    weight = model.get_base_model().handover.modules_to_save["default"].weight
    assert not torch.equal(weight, torch.eye(len(weight)))
    with model.disable_adapter():  # the method untrained reads through the same map
        assert torch.equal(in_use(model.get_base_model().handover).weight, weight)
    (tmp_path / "run" / "checkpoint-4" / "curriculum.json").unlink()
    again = train_small(*flags, "--resume_from_checkpoint", "true")
    assert logged(again, "loss")[-1:] == logged(whole, "loss")[-1:]
    started = train_small(
        *flags, "--output_dir", tmp_path / "on", "--init_adapter_path", tmp_path / "run", "--seed", "5"
    )
    now = started.model.get_base_model().handover.modules_to_save["default"].weight
    assert torch.equal(now.cpu(), weight)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["memory_handover"] == "aligned"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--notes_weight -1", "`--notes_weight` must be 0 or more; got .-1.0."),
        ("--notes_weight 1 1 1", "`--notes_weight` must be one number, or one for each of 2 stages; got .1.0, 1.0, 1.0."),
        ("--notes_weight 1 --task text --text_path book.txt", "`--notes_weight` 1: the first texts of task text have nothing to note"),
        ("--notes_weight 1 --task dataset --dataset_name rows.jsonl", "`--notes_weight` 1: the first texts of task dataset have nothing"),
        ("--notes_weight 1 --curriculum_stages 1", "no text of one segment hands on a memory.*got `--curriculum_stages` .1."),
        ("--notes_weight 1 1 1 --dry_run", "`--notes_weight` must be one number, or one for each of 2 stages; got .1.0, 1.0, 1.0."),
        ("--notes_weight 1 --curriculum_stages 1 --dry_run", "`--notes_weight` 1: no text of one segment hands on a memory"),
        ("--notes_weight 1 --task passkey,dataset --dataset_name bad.jsonl", "bad.jsonl row 1: `notes` must be a text or a list"),
        ("--memory_handover mapped", "`--memory_handover` must be identity, scaled, aligned or tokens; got mapped"),
    ],
)  # fmt: skip
def test_refused_before_weights_are_loaded(train_small, tmp_path, monkeypatch, flags, expected):
    from lrmt.tasks import prose

    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("\n".join(prose.write(300, 0)))
    row = {"input": "Nobody told.", "question": "Where is it?", "target": "here"}
    (tmp_path / "rows.jsonl").write_text(20 * (json.dumps(row) + "\n"))
    (tmp_path / "bad.jsonl").write_text(20 * (json.dumps(row | {"notes": 5}) + "\n"))
    monkeypatch.setattr("lrmt.training.run.build_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=expected):
        train_small("--output_dir", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["dataset", "passkey,dataset"])
def test_rows_without_notes_are_counted_once(train_small, tmp_path, monkeypatch, capsys, task):
    said = [f"The key is {'here' if i % 2 else 'there'}. {'And so on. ' * 40}" for i in range(20)]
    rows = [{"input": text, "question": "Where is it?", "target": "here"} for text in said]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("lrmt.training.run.build_model", lambda *_, **__: (_ for _ in ()).throw(UsageError("so far")))
    with pytest.raises(UsageError, match="so far"):
        train_small("--notes_weight", "1", "--task", task, "--dataset_name", tmp_path / "rows.jsonl")
    told = re.findall(r"`--notes_weight` 1: (\d+) of the first (\d+) rows have neither notes", capsys.readouterr().out)
    ((without, looked_at),) = told
    assert 0 < int(without) < int(looked_at) <= 16 + 16 * (task != "dataset")


def test_the_memory_of_stories_begins_with_nobody_anywhere(train_small, fp32_flags, pieces):
    flags = [*fp32_flags, *NOTES, "--task", "passkey,qa1", "--segment_length", "128", "--stage_max_steps", "1"]
    trainer = train_small(*flags, "--num_memory_tokens", "24", "--learning_rate", "0")
    model, said = trainer.model.get_base_model(), pieces("Daniel now John now Mary now Sandra now")
    said = torch.tensor([*said, pieces.tokenizer.eos_token_id])
    assert torch.equal(model.start(1)[0, : len(said)], model.get_input_embeddings()(said))


def test_with_positions_the_memory_begins_with_nothing_said(train_small, fp32_flags, pieces):
    flags = [*fp32_flags, *NOTES, "--memory_positions", "true", "--memory_shift", "true", "--stage_max_steps", "1"]
    model = train_small(*flags, "--learning_rate", "0").model.get_base_model()
    end = model.get_input_embeddings()(torch.tensor(pieces.tokenizer.eos_token_id))
    places = model.memory_positions(torch.arange(model.config.num_memory_tokens))
    torch.testing.assert_close(model.start(1)[0, 1], places[1] + end)


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_landmark_model_takes_no_notes(run_recipe, backbones, tmp_path, dry_run):
    flags = ["--model_name_or_path", backbones["llama"], "--notes_weight", "1", "--context_length", "112"]
    flags += ["--block_length", "16", "--num_digits", "2", "--output_dir", tmp_path / "run", "--dry_run", dry_run]
    with pytest.raises(UsageError, match="`--notes_weight` 1: landmark writes no memory tokens"):
        run_recipe("landmark_llama", *flags)


# ---------------------------------------------------------------------- batches of notes


@pytest.fixture(scope="module")
def pieces(backbones):
    from lrmt.adapters.backbone import load_tokenizer

    return Pieces(load_tokenizer(str(backbones["llama"])))


def example(*notes):
    empty = torch.zeros(0).long().numpy()
    return Example(empty, empty, "", "", "", lambda: [Note(*note) for note in notes])


def test_notes_are_laid_out_and_cut(pieces):
    notes, cut = collate_notes([example((5, "kitchen"), (9, "garden kitchen hallway")), example()], pieces, 8)
    kitchen, end = pieces("kitchen").tolist(), pieces.tokenizer.eos_token_id
    assert notes.ids.shape == (2, 3, 8) and notes.ends[0].tolist() == [0, 5, 9]
    assert notes.ids[0, 0].tolist() == [
        end,
        *[-100] * 7,
    ]  # before anything is told there is nothing to say, and that is said
    assert notes.ids[0, 1].tolist() == [*kitchen, end, *[-100] * (7 - len(kitchen))]
    assert bool((notes.ids[1] == -100).all()) and int(notes.ends[1, 0]) > 10**12
    assert not cut and collate_notes([example((1, "garden kitchen hallway"))], pieces, 1)[1]
    assert not collate_notes([example((1, "kitchen"))], pieces, len(kitchen))[1]  # the end alone does not fit any more
    garden = int(pieces("garden")[0])
    assert collate_notes([example((1, "garden kitchen"))], pieces, 1)[0].ids.tolist() == [[[end], [garden]]]


def test_a_note_may_become_empty_again(pieces):
    notes, _ = collate_notes([example((5, "kitchen"), (9, ""))], pieces, 3)
    assert notes.ids[0, 2].tolist() == [pieces.tokenizer.eos_token_id, -100, -100]


def test_the_meter_tells_by_age():
    meter = NotesMeter()
    meter.add(NotesScore(torch.tensor(3.0), torch.tensor([True, False, True, True]), torch.tensor([0, 0, 3, 40])))
    meter.add(NotesScore(torch.tensor(1.0), torch.tensor([True]), torch.tensor([2])))
    meter.add(
        NotesScore(torch.tensor(0.5), torch.tensor([True, False, True]), torch.tensor([-1, -1, -1]))
    )  # nobody told
    told = NotesMeter.values(meter.numbers(), "eval_")
    assert told == {
        "eval_notes_loss": 0.5625, "eval_notes_accuracy": 0.8, "eval_notes_accuracy_0": 0.5, "eval_notes_accuracy_2_3": 1.0,
        "eval_notes_accuracy_16_up": 1.0,
    }  # fmt: skip
    assert NotesMeter.values(NotesMeter().numbers()) == {}


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("task", ["qa1", "passkey, qa7", "dataset", "passkey,dataset"])
def test_no_story_goes_on_from_another(train_small, task, dry_run):
    """Nor a row of the user's own."""
    rows = ["--dataset_name", "rows.jsonl"] if "dataset" in task else []
    what = "a row of --dataset_name" if rows else "a story of qa[17]"
    with pytest.raises(UsageError, match=f"`--state_passing` 0.5: .* {what} .*; set `--state_passing 0`"):
        train_small("--task", task, *rows, "--state_passing", "0.5", "--dry_run", dry_run)
