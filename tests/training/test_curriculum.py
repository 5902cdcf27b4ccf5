"""The curriculum: who is promoted and why, what is drawn, and how it goes on after a checkpoint."""

import json
from collections import Counter

import pytest

from lrmt.errors import UsageError
from lrmt.training.curriculum import Curriculum


def build(**changes):
    return Curriculum(**{"stages": [1, 2, 4], "max_steps": [5, 3, 2], "promotion_accuracy": 0.9} | changes)


def advance(curriculum, steps):
    for _ in range(steps):
        reached = curriculum.advance()
    return reached


def test_accuracy_promotes_and_says_why():
    curriculum = build()
    assert not advance(curriculum, 2)
    assert curriculum.report(0.89) is None
    assert (curriculum.stage, curriculum.segments) == (0, 1)
    message = curriculum.report(0.9)
    assert (
        message == "stage 1 of 3 (1 segments) ends: accuracy 0.900 reached 0.900 after 2 steps; next: up to 2 segments"
    )
    assert (curriculum.stage, curriculum.stage_step, curriculum.segments) == (1, 0, 2)
    assert curriculum.history == [message]


def test_step_limit_promotes_and_says_why():
    curriculum = build()
    assert [curriculum.advance() for _ in range(5)] == [False] * 4 + [True]
    message = curriculum.report(0.25)
    assert "step limit 5 reached with accuracy 0.250; next" in message
    assert curriculum.stage == 1


def test_last_stage_finishes():
    curriculum = build()
    for limit in (5, 3):
        assert advance(curriculum, limit)
        curriculum.report(0.0)
        assert not curriculum.finished
    advance(curriculum, 1)
    assert curriculum.report(1.0) is None  # its learning rate has a way to go
    advance(curriculum, 1)
    assert curriculum.report(1.0).endswith("step limit 2 reached with accuracy 1.000; curriculum finished")
    assert curriculum.finished and curriculum.stage == 2 and len(curriculum.history) == 3


def test_ranks_draw_alike_and_all_lengths_up_to_the_stage():
    ranks = build(seed=7), build(seed=7)
    for curriculum in ranks:
        curriculum.stage = 2
    draws = [[curriculum.draw_segments(step) for step in range(400)] for curriculum in ranks]
    assert draws[0] == draws[1]
    counts = Counter(draws[0])
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 60  # uniform: 100 each
    assert draws[0] != [build(seed=8, stages=[4], max_steps=[5]).draw_segments(step) for step in range(400)]


def test_draws_do_not_depend_on_what_was_drawn_before():
    curriculum = build(stages=[8], max_steps=[50])
    inorder = [curriculum.draw_segments(step) for step in range(20)]
    assert [curriculum.draw_segments(step) for step in reversed(range(20))] == inorder[::-1]


def test_fixed_lengths():
    curriculum = build(vary_lengths=False, stage=2)
    assert {curriculum.draw_segments(step) for step in range(50)} == {4}


def test_one_limit_serves_every_stage():
    assert build(max_steps=[7]).max_steps == [7, 7, 7]
    assert build(max_steps=[7]).total_steps == 21


def test_state_round_trip_goes_on_alike():
    one = build(seed=3)
    advance(one, 3)
    one.report(0.95)
    advance(one, 1)
    other = build(seed=3)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other == one
    for step in range(4, 6):
        assert one.draw_segments(step) == other.draw_segments(step)
        assert one.advance() == other.advance()
    assert one.report(0.1) == other.report(0.1)
    assert one == other


@pytest.mark.parametrize(
    "changes", [{"stages": [1, 2, 8]}, {"max_steps": [5, 3, 3]}, {"vary_lengths": False}, {"seed": 1}]
)
def test_checkpoint_of_another_curriculum_is_refused(changes):
    curriculum = build()
    advance(curriculum, 2)
    other = build(**changes)
    with pytest.raises(UsageError, match=f"trained with {next(iter(changes))} = .*use the same"):
        other.load_state_dict(curriculum.state_dict())
    assert other.stage_step == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "--curriculum_stages"),
        ({"stages": [0, 1, 2]}, "--curriculum_stages"),
        ({"stages": [2, 1, 4]}, "must not shrink; got .2, 1, 4"),
        ({"max_steps": [1, 2]}, "--stage_max_steps.*one per stage.*got .1, 2. for 3 stages"),
        ({"max_steps": [0]}, "--stage_max_steps"),
        ({"promotion_accuracy": 95.0}, "--promotion_accuracy.*got 95"),
        ({"promotion_accuracy": 0.0}, "--promotion_accuracy"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        build(**changes)


def test_min_segments_is_the_shortest_text_drawn():
    curriculum = Curriculum(stages=[1, 4], max_steps=[5], min_segments=3)
    assert {curriculum.draw_segments(step) for step in range(50)} == {
        1
    }  # a stage shorter than that draws its own length
    curriculum.stage = 1
    assert {curriculum.draw_segments(step) for step in range(50)} == {3, 4}
    with pytest.raises(UsageError, match="--min_segments"):
        Curriculum(stages=[2], max_steps=[5], min_segments=0)


def test_texts_are_cut_short_by_up_to_the_slack_where_lengths_vary():
    varied, fixed = (build(stages=[2], max_steps=[5], vary_lengths=vary, slack=6) for vary in (True, False))
    drawn = {varied.draw_length(step, 10) for step in range(400)}
    assert drawn == {*range(4, 11), *range(14, 21)}
    assert {fixed.draw_length(step, 10) for step in range(50)} == {20}
    assert {build(stages=[2], max_steps=[5]).draw_length(step, 10) for step in range(50)} == {10, 20}
    assert varied.draw_length(7, 10) == build(stages=[2], max_steps=[5], vary_lengths=True, slack=6).draw_length(7, 10)
