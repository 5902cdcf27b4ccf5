"""The command `lrmt`: one table of commands. Heavy imports wait until a command runs, so that help and mistakes cost no time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from lrmt import __version__
from lrmt.errors import UsageError, exit_on_error, suggest
from lrmt.flags import HELP, build, parse_settings


class Command(NamedTuple):
    """`settings`: the dataclass of its flags, whose `description` and `examples` its help shows; `run` takes one of them."""

    settings: str
    run: Callable
    summary: str


def find(path: str):
    """What "package.module:name" says."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def evaluate(settings):
    quiet_libraries()
    run = find(settings.function)
    return run(**settings.options()) if settings.harness else run(settings)


def inspect(settings):
    quiet_libraries()
    find("lrmt.evaluation.inspect:run_inspection")(settings)


def merge(settings):
    quiet_libraries()
    other = {} if settings.model_name_or_path is None else {"model_name_or_path": settings.model_name_or_path}
    merge_adapter = find("lrmt.publishing.merge:merge_adapter")
    gaps = merge_adapter(settings.adapter_path, settings.output_dir, settings.merge_base, **other)
    print(f"merged into {settings.output_dir} over {settings.merge_base} weights; relative gap of its logits")
    print(f"  {gaps['same_base']:.1e}  to the adapter over the same weights (rounding)")
    print(f"  {gaps['as_trained']:.1e}  to the adapter as it was trained")


def plan(settings):
    quiet_libraries()
    find("lrmt.evaluation.plan:run_plan")(settings)


def score(settings):
    find("lrmt.evaluation.babilong.rescoring:score_folder")(**vars(settings))


def report(settings):
    find("lrmt.evaluation.report:run_report")(**vars(settings))


def build_data(settings):
    quiet_libraries()
    files = find("lrmt.data.write:build")(settings)
    told = "1 file is" if len(files) == 1 else f"{len(files)} files are"
    print(f"{told} in {settings.output_dir}; load with")
    print(f'  datasets.load_dataset("{settings.output_dir}", "{files[0].parent.name}", split="{settings.task[0]}")')


def show_data(settings):
    quiet_libraries()
    find("lrmt.data.show:show")(settings)


COMMANDS = {
    "evaluate": Command("lrmt.evaluation.settings:EvaluationSettings", evaluate, "accuracy by length, with baselines"),
    "inspect": Command(
        "lrmt.evaluation.inspection:InspectionSettings", inspect, "what a memory says, what an answer read"
    ),
    "merge": Command("lrmt.publishing.settings:MergeSettings", merge, "write an adapter into its backbone"),
    "plan": Command("lrmt.evaluation.planning:PlanSettings", plan, "what reading costs, by method and length"),
    "score": Command("lrmt.evaluation.babilong.rescoring:ScoreSettings", score, "score public predictions again"),
    "report": Command("lrmt.evaluation.report:ReportSettings", report, "several models' results side by side"),
    "data build": Command("lrmt.data.settings:BuildSettings", build_data, "write samples to disk"),
    "data show": Command("lrmt.data.settings:ShowSettings", show_data, "print one sample"),
}


def quiet_libraries():
    """Leaves errors, and the warnings of lrmt itself."""
    import logging
    import warnings

    from lrmt.progress import quiet_bars

    quiet_bars()
    warnings.filterwarnings("ignore", module="bitsandbytes")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


def parse(argv: Sequence[str]) -> tuple[Command, type, dict[str, object]]:
    """The command, the class of its settings, and what was given. Raises UsageError for whatever is mistyped."""
    name, words = "", list(argv)
    while name not in COMMANDS:
        commands = {command.removeprefix(name).split()[0] for command in COMMANDS if command.startswith(name)}
        if words[:1] == ["--version"]:
            print(f"lrmt {__version__}")
            raise SystemExit(0)
        if words and words[0] in HELP:
            print(describe(name))
            raise SystemExit(0)
        if not words or words[0] not in commands:
            got = f"no command {words[0]!r}{suggest(words[0], commands)}" if words else "name a command"
            raise UsageError(f"{got}; see {f'lrmt {name}'.strip()} --help")
        name += words.pop(0)
        name += "" if name in COMMANDS else " "
    command, program = COMMANDS[name], f"lrmt {name}"
    settings = find(command.settings)
    if hasattr(settings, "parse"):  # which settings, the words say
        return command, *settings.parse(words, program)
    return command, *parse_settings(settings, words, program)


def describe(group: str = "") -> str:
    """The help of `lrmt`, or of a group of its commands."""
    rows = "\n".join(f"  {name:12} {command.summary}" for name, command in COMMANDS.items() if name.startswith(group))
    return (
        f"usage: lrmt {group}COMMAND [flags]\n\nLong memory for pretrained LLaMA and Mistral.\n\ncommands:\n{rows}\n\n"
        "lrmt COMMAND --help tells its flags, lrmt --version the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (2 for bad input, which is one line on stderr)."""
    try:
        with exit_on_error():
            command, *settings = parse(sys.argv[1:] if argv is None else argv)
            command.run(build(*settings))
    except KeyboardInterrupt:
        print("lrmt: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
