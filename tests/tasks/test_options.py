"""Every option once: its default, help and check reach whoever inherits its group."""

from dataclasses import MISSING, dataclass, fields, make_dataclass, replace

import pytest

from lrmt.data.settings import BuildSettings, ShowSettings
from lrmt.errors import UsageError
from lrmt.tasks import names, options, passkey, registry
from lrmt.tasks.options import BackgroundOptions, Options, SpanOptions, StoryOptions, TaskOptions

GROUPS = [group for group in vars(options).values() if isinstance(group, type) and Options in group.__bases__]
BAD = [
    ({"max_n_facts": 0}, "--max_n_facts must be 1 or more, or left out; got 0"),
    ({"babi_dir": "a", "babi_vocabulary": "b"}, "--babi_vocabulary is of simulated stories, .* got b and a. Leave one out"),
    ({"background_dir": "a", "background_dataset": "b"}, "--background_dir and --background_dataset .* got a and b. Name one"),
    ({"question_position": "lst"}, "--question_position must be one of last, first, both; got 'lst'; did you mean last?"),
    ({"task_start_pct": 0.7, "task_end_pct": 0.2}, "0 <= start <= end <= 1; got 0.7 and 0.2"),
    ({"task_start_pct": -0.1}, "--task_start_pct"),
    ({"depth": 1.5}, r"--depth must lie in \[0, 1\] \(0 = the first fact at the top\); got 1.5"),
    ({"depth": float("nan")}, "--depth"),
    ({"depth": 0.5, "task_end_pct": 0.7}, "--depth 0.5 says where .* --task_end_pct 0.7"),
    ({"early_facts_share": 2}, r"--early_facts_share must lie in \[0, 1\]; got 2"),
    ({"num_digits": 0}, r"--num_digits must be 1..18; got 0"),
    ({"num_digits": 19}, r"--num_digits must be 1..18; got 19"),
    ({"passkey_wording": "longlara"}, "--passkey_wording must be one of plain, .*; got 'longlara'; did you mean longlora?"),
]  # fmt: skip


def test_every_option_stands_in_one_group_with_its_help():
    own = [field.name for group in GROUPS for field in fields(group)]
    assert len(own) == len(set(own)) and set(own) == {field.name for field in fields(TaskOptions)}
    for settings in (TaskOptions, BuildSettings, ShowSettings):
        for field in fields(settings):
            assert field.metadata["help"].endswith("."), field.name
    of = {field.name: field for field in fields(TaskOptions)}
    for settings in (BuildSettings, ShowSettings):
        shared = [field for field in fields(settings) if field.name in of]
        assert len(shared) >= 9
        for field in shared:
            assert (field.default, field.metadata) == (of[field.name].default, of[field.name].metadata)


def test_defaults_pass_alone_and_together():
    for group in (*GROUPS, TaskOptions):
        assert all(field.default is not MISSING for field in fields(group))
        group()


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_value_is_checked_wherever_its_group_is_inherited(given, message):
    with pytest.raises(UsageError, match=message):
        TaskOptions(**given)
    (group,) = (group for group in GROUPS if given.keys() <= {field.name for field in fields(group)})

    @dataclass
    class Command(SpanOptions if group is not SpanOptions else StoryOptions, group):
        name: str = "x"

        def check(self):
            assert self.name == "x"

    Command()
    with pytest.raises(UsageError, match=message):
        Command(**given)
    with pytest.raises(UsageError, match=message):
        replace(Command(), **given)
    with pytest.raises(AssertionError):
        Command(name="y")


def test_options_of_settings_are_those_of_the_same_name():
    settings = make_dataclass("Settings", [("depth", float, 0.5), ("other", int, 1)], bases=(BackgroundOptions,))
    made = TaskOptions.of(settings(background_dir="books"), num_digits=7)
    assert (made.depth, made.background_dir, made.num_digits) == (0.5, "books", 7)
    assert TaskOptions.of(settings()) == TaskOptions(depth=0.5)
    with pytest.raises(TypeError, match="num_digit"):
        registry.build_task("passkey", None, num_digit=7)


def test_names_of_tasks_stand_once():
    assert {*registry._HAYSTACKS} == {*names.HAYSTACKS} and {*registry._HAYSTACKS, *registry._OTHERS} == {*names.TASKS}
    assert tuple(passkey.WORDINGS) == names.PASSKEY_WORDINGS
