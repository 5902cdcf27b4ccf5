"""The command `lrmt`. Heavy imports are inside the subcommands, so that help and mistakes cost no time."""

import argparse
import sys

from lrmt import __version__
from lrmt.errors import exit_on_error, suggest
from lrmt.evaluation.settings import EvaluationSettings, InspectionSettings

EVALUATE = """\
Accuracy by length with a 95 % confidence interval (Wilson), beside two columns measured in the same run:
  untrained   the same memory before training (the adapter disabled)
  backbone    the bare model, shown as much of the END of the text as one segment holds

Writes results.json (one record a cell: model, task, length_tokens, segments, accuracy, ci_low, ci_high, n; accuracy
and interval in 0..1), heatmap.png and settings.json. Started again with the same settings, it keeps the finished cells
and measures the others, further --lengths and --task included.

--task perplexity --text_path PATH measures perplexity by context length instead, of the three on the same tokens: the
last half segment before a drawn place of the text, after 1, 2, 4, … segments that end there. Writes perplexity.json
(model, task, length_tokens, segments, perplexity, nll, nll_stderr, n), perplexity.png and settings.json.
"""

EVALUATE_EXAMPLES = """\
examples:
  lrmt evaluate --adapter_path runs/passkey --task passkey --lengths 1 2 4 8 16 32
  lrmt evaluate --adapter_path runs/qa1 --task qa1 qa2 --lengths 4k 16k 64k --background_dir books
  lrmt evaluate --adapter_path runs/qa1 --task qa1 --babi_dir tasks_1-20_v1-2/en-valid-10k --num_samples 1000
  lrmt evaluate --adapter_path runs/mine --dataset_name questions.jsonl
  lrmt evaluate --adapter_path runs/books --task perplexity --text_path books --split validation --lengths 1 2 4 8
"""

INSPECT = """\
Reads a text with a landmark adapter, answers, and tells which blocks of the text each answer token read beyond what is
always near: the passages, and their share of the attention, averaged over layers and heads.

Writes retrieval.json (one record for each answer token, layer and block: share of the attention in 0..1, averaged over
heads; start_token, where the block's passage begins) and retrieval.png (layers by blocks, averaged over answer tokens).
"""

INSPECT_EXAMPLES = """\
examples:
  lrmt inspect --adapter_path runs/landmark --input book.txt --question "What is the pass key? The pass key is"
  lrmt inspect --adapter_path runs/landmark --input book.txt --max_new_tokens 4 --top 3 --output_dir reading
"""

MERGE = """\
Writes the adapter into its backbone: a folder of full weights that lrmt.load reads without PEFT. Prints how far the
logits of the merged model are from those of the unmerged one.
"""

MERGE_EXAMPLES = """\
example:
  lrmt merge --adapter_path runs/passkey --output_dir runs/passkey-merged
"""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error and no guessing of abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"lrmt: error: {message}; see {self.prog} --help\n")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `lrmt`, and those of its commands."""
    parser = Parser(prog="lrmt", description="Long memory for pretrained LLaMA and Mistral.")
    parser.add_argument("--version", action="version", version=f"lrmt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    add_evaluate(commands)
    add_inspect(commands)
    add_merge(commands)
    return parser, commands.choices


def add_evaluate(commands):
    parser = commands.add_parser(
        "evaluate", help="accuracy by length, with baselines", description=EVALUATE, epilog=EVALUATE_EXAMPLES
    )
    add = parser.add_argument
    add("--adapter_path", required=True, metavar="DIR", help="folder that training wrote (an adapter) or lrmt merge")
    add(
        "--task", nargs="+", default=[], metavar="NAME", help="passkey, qa1, … qa20, several make a grid; or perplexity"
    )
    add(
        "--lengths",
        nargs="+",
        default=[],
        metavar="N",
        help="segments as plain numbers (8); tokens with k or M (4k, 1M; 1k = 1000), rounded down to whole segments so "
        "that the question lies in the last one (default: 1 2 4 8 16 32; of perplexity 1 2 4 8)",
    )
    add(
        "--text_path",
        metavar="PATH",
        help="of --task perplexity: a folder of .txt files, a .txt file, a .jsonl file with column text, or a Hub id; split "
        "test is all of it, validation the last tenth, which training on it leaves out",
    )
    add(
        "--dataset_name",
        metavar="FILE",
        help="your own rows instead of --task: a .jsonl or .parquet file with columns input, question, target; right is "
        "what equals the target (first line, case ignored); length_tokens is the mean",
    )
    add(
        "--num_samples",
        type=int,
        metavar="N",
        help="questions a cell (default: 100; with --dataset_name: all rows), or texts of perplexity (default: 20)",
    )
    add("--batch_size", type=int, default=8, metavar="N", help="questions answered at once (default: 8)")
    add("--seed", type=int, default=0, metavar="N", help="of the generated questions (default: 0)")
    add(
        "--split",
        default="test",
        metavar="NAME",
        help="train, validation or test (default: test; of a --babi_dir without test files, its validation files)",
    )
    add("--babi_dir", metavar="DIR", help="official bAbI files (qa1_test.txt, …); without it stories are simulated")
    add("--background_dir", metavar="DIR", help="books (.txt) to hide the facts in; without it built-in prose")
    add("--num_digits", type=int, default=5, metavar="N", help="of a pass key, as in training (default: 5)")
    add(
        "--question_position",
        default="last",
        metavar="WHERE",
        help="last, first or both, as in training (default: last)",
    )
    add("--max_n_facts", type=int, metavar="N", help="leave out bAbI stories with more facts than this")
    add("--load_in_4bit", action="store_true", default=None, help="backbone in NF4 (default: as trained)")
    add("--no_load_in_4bit", dest="load_in_4bit", action="store_false", help="backbone in full (default: as trained)")
    add_reading(add)
    add(
        "--scoring",
        default="official",
        metavar="RULE",
        help="of the qa tasks: official (BABILong's, where a target 'none' of qa7 never scores), strict (whole words, "
        "mends that), contains, exact (default: official); passkey: first integer, always",
    )
    add("--output_dir", metavar="DIR", help="default: ADAPTER_PATH/evaluation, or ADAPTER_PATH/perplexity")
    add("--overwrite", action="store_true", help="replace an evaluation of other settings in --output_dir")
    parser.set_defaults(run=evaluate)


def add_reading(add):
    add("--top_k", type=int, metavar="N", help="landmark attention: blocks that a token reads (default: as trained)")
    add("--retrieval", metavar="WHO", help="landmark attention: token or chunk chooses blocks (default: as trained)")
    add("--offload_blocks", action="store_true", default=None, help="landmark attention: keep blocks in CPU memory")


def add_inspect(commands):
    parser = commands.add_parser(
        "inspect", help="which passages an answer read", description=INSPECT, epilog=INSPECT_EXAMPLES
    )
    add = parser.add_argument
    add("--adapter_path", required=True, metavar="DIR", help="folder that landmark training wrote")
    add("--input", required=True, metavar="FILE", help="text to read, UTF-8")
    add("--question", metavar="TEXT", help="asked after the text (default: none, the text goes on)")
    add("--max_new_tokens", type=int, default=16, metavar="N", help="longest answer (default: 16)")
    add("--top", type=int, default=5, metavar="N", help="blocks shown, the best (default: 5)")
    add("--load_in_4bit", action="store_true", default=None, help="backbone in NF4 (default: as trained)")
    add("--no_load_in_4bit", dest="load_in_4bit", action="store_false", help="backbone in full (default: as trained)")
    add_reading(add)
    add("--output_dir", metavar="DIR", help="default: ADAPTER_PATH/inspection")
    add("--overwrite", action="store_true", help="replace an inspection in --output_dir")
    parser.set_defaults(run=inspect)


def add_merge(commands):
    parser = commands.add_parser(
        "merge", help="write an adapter into its backbone", description=MERGE, epilog=MERGE_EXAMPLES
    )
    add = parser.add_argument
    add("--adapter_path", required=True, metavar="DIR", help="folder that training wrote")
    add("--output_dir", required=True, metavar="DIR", help="folder for the merged model, new or empty")
    add(
        "--merge_base",
        choices=("original", "nf4_roundtrip"),
        default="original",
        help="weights to add the adapter to: as published (original), or rounded to NF4 and back, which is what a 4-bit "
        "adapter was trained against (default: original)",
    )
    parser.set_defaults(run=merge)


def evaluate(options):
    options.update(task=tuple(options["task"]), lengths=tuple(options["lengths"]))
    settings = EvaluationSettings(**options)
    quiet_libraries()
    if settings.measures_perplexity:
        from lrmt.evaluation.perplexity import run_perplexity

        run_perplexity(settings)
    else:
        from lrmt.evaluation.run import run_evaluation

        run_evaluation(settings)


def inspect(options):
    settings = InspectionSettings(**options)
    quiet_libraries()
    from lrmt.evaluation.inspect import run_inspection

    run_inspection(settings)


def merge(options):
    quiet_libraries()
    from lrmt.publishing.merge import merge_adapter

    gaps = merge_adapter(options["adapter_path"], options["output_dir"], options["merge_base"])
    print(f"merged into {options['output_dir']} over {options['merge_base']} weights; relative gap of its logits")
    print(f"  {gaps['same_base']:.1e}  to the adapter over the same weights (rounding)")
    print(f"  {gaps['as_trained']:.1e}  to the adapter as it was trained")


def quiet_libraries():
    """Leaves errors, and the warnings of lrmt itself."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module="bitsandbytes")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


def parse(argv) -> dict:
    """Options by name; whatever is mistyped ends here with a suggestion, before argparse misses what it should have been."""
    parser, commands = build_parser()
    if argv and not argv[0].startswith("-"):
        if argv[0] not in commands:
            parser.error(f"no command {argv[0]!r}{suggest(argv[0], commands)}")
        flags = commands[argv[0]]._option_string_actions
        for flag in (word.split("=")[0] for word in argv[1:] if word.startswith("--")):
            if flag not in flags:
                commands[argv[0]].error(f"no flag {flag}{suggest(flag, flags)}")
    return vars(parser.parse_args(argv))


def main(argv=None) -> int:
    """Runs one command; returns its exit code (2 for bad input, which is one line on stderr)."""
    options = parse(sys.argv[1:] if argv is None else list(argv))
    run, _ = options.pop("run"), options.pop("command")
    try:
        with exit_on_error():
            run(options)
    except KeyboardInterrupt:
        print("lrmt: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
