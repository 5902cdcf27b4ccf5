"""The command `lrmt`. Heavy imports are inside the subcommands, so that help and mistakes cost no time."""

import argparse
import sys

from lrmt import __version__
from lrmt.errors import UsageError, exit_on_error, suggest
from lrmt.evaluation.settings import BASELINES, DEFAULT_BASELINES, READING, EvaluationSettings, InspectionSettings

EVALUATE = f"""\
Accuracy by length with a 95 % confidence interval (Wilson), beside baselines measured in the same run (--baseline):
{chr(10).join(f"  {name:15} {what}" for name, what in BASELINES.items())}

Writes results.json (one record a cell: model, task, length_tokens, segments, accuracy, ci_low, ci_high, n; length, the
name that was asked for, and depth, where given; accuracy and interval in 0..1), heatmap.png, settings.json, and the
answers to bAbI tasks as BABILong's leaderboard takes them (babilong_evals). Started again with the same settings, it
keeps the finished cells and measures the others, further --lengths, --task and --baseline included. Under accelerate
launch the processes share the questions.

--task perplexity --text_path PATH measures perplexity by context length instead, of the three on the same tokens: the
last half segment before a drawn place of the text, after 1, 2, 4, … segments that end there. Writes perplexity.json
(model, task, length_tokens, segments, perplexity, nll, nll_stderr, n), perplexity.png and settings.json.
"""

EVALUATE_EXAMPLES = """\
examples:
  lrmt evaluate --adapter_path runs/passkey --task passkey --lengths 1 2 4 8 16 32
  lrmt evaluate --adapter_path runs/qa1 --task qa1 qa2 --lengths 4k 16k 64k --background_dir books
  lrmt evaluate --adapter_path runs/qa1 --task qa1 --babi_dir tasks_1-20_v1-2/en-valid-10k --num_samples 1000
  lrmt evaluate --adapter_path runs/qa1 --task qa1 qa2 qa3 --lengths 1 2 4 8 --baseline backbone sliding_window xl rag
  lrmt evaluate --adapter_path runs/passkey --task passkey --lengths 4 8 16 --depths 0 0.25 0.5 0.75 1
  lrmt evaluate --adapter_path runs/qa1 --harness babilong_qa1 --lengths 0k 4k --harness_data data/babilong
  lrmt evaluate --adapter_path runs/qa1 --dataset_name RMT-team/babilong --task qa1 qa2 --lengths 0k 4k 128k
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

SCORE = """\
Scores public predictions again: a folder of <org>/<model>/<task>_<length>_instruction_….csv with the columns (index),
target, output, question, as BABILong's leaderboard takes them. Prints accuracy by task and length for each model,
prompt and rule: official (BABILong's), strict (whole words) and contains (lm-evaluation-harness's).

With --output_dir, writes scores.json (the records of results.json, with rule and variant) and heatmap_<rule>.png.
"""

SCORE_EXAMPLES = """\
examples:
  lrmt score babilong_evals
  lrmt score babilong_evals/microsoft --output_dir runs/scores
"""

REPORT = """\
Draws results of several models side by side, with BABILong's published figures as reference rows in italics:
report.png, report.md and report.csv, by task, model and context length. A text that was asked for by a name (4k), or is
within 5 % of one of BABILong's lengths, stands in its column; of several depths it is the mean; qa1-5 is the mean over
the five tasks.
"""

REPORT_EXAMPLES = """\
examples:
  lrmt report runs/qa1 runs/scores/scores.json --task qa1
  lrmt report runs/a/results.json runs/b/results.json --names small large --no_published --output_dir runs/both
"""


DATA_BUILD = """\
Writes samples with the columns input, question, target: facts of a question, in order, between sentences of background
text. Configuration = length, split = task, as the public sets have it:
  datasets.load_dataset(OUTPUT_DIR, "4k", split="qa1")

Facts and background have exactly --reserved_tokens tokens less than a length says, counted by --tokenizer; 0k is facts
alone. A sample depends on seed, split, task, length and index alone. Started again, it keeps the files that are there;
further --task and --lengths join them. The background is tokenised once, and cached in $LRMT_CACHE or ~/.cache/lrmt.
"""

DATA_BUILD_EXAMPLES = """\
examples:
  lrmt data build --task qa1 qa2 qa3 --lengths 0k 4k 128k 1M --background_dir books --output_dir data/babilong
  lrmt data build --task qa1 qa5 --lengths 4k --babi_dir tasks_1-20_v1-2/en-10k --tokenizer gpt2 --output_dir data/qa
  lrmt data build --task qa1 --lengths 4k --split train --num_samples 1000 --format chat --output_dir data/chat
"""

DATA_SHOW = """\
Makes one sample, as lrmt data build would, and prints it with its facts highlighted and their positions in tokens.
"""

DATA_SHOW_EXAMPLES = """\
examples:
  lrmt data show --task qa2 --lengths 4k --background_dir books
  lrmt data show --task niah_single --lengths 16k --depth 0.5 --index 3 --full
"""


#: flags of `lrmt evaluate` that --harness takes too
OF_HARNESS = ("adapter_path", "lengths", "num_samples", "batch_size", "seed", "load_in_4bit", *READING)
OF_HARNESS += ("output_dir", "overwrite")


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
    add_score(commands)
    add_report(commands)
    add_data(commands)
    return parser, commands.choices


def add_evaluate(commands):
    parser = commands.add_parser(
        "evaluate", help="accuracy by length, with baselines", description=EVALUATE, epilog=EVALUATE_EXAMPLES
    )
    add = parser.add_argument
    add("--adapter_path", required=True, metavar="DIR", help="folder that training wrote (an adapter) or lrmt merge")
    add(
        "--task",
        nargs="+",
        default=[],
        metavar="NAME",
        help="passkey, qa1, … qa20, niah_single, memorize, detect_memorize, reasoning, several make a grid; or perplexity",
    )
    add(
        "--lengths",
        nargs="+",
        default=[],
        metavar="N",
        help="segments as plain numbers (8); tokens with k or M (4k, 1M; 1k = 1000), rounded down to whole segments so "
        "that the question lies in the last one; 0k: facts without background (default: 1 2 4 8 16 32; of perplexity 1 2 4 8); "
        "with --dataset_name, its configurations",
    )
    add(
        "--text_path",
        metavar="PATH",
        help="of --task perplexity: a folder of .txt files, a .txt file, a .jsonl file with column text, or a Hub id; split "
        "test is all of it, validation the last tenth, which training on it leaves out",
    )
    add(
        "--dataset_name",
        metavar="NAME",
        help="stored rows with columns input, question, target. With --task and --lengths: a public set by its Hub id, or a "
        "folder such as lrmt data build writes, with a configuration for each length and a split for each task. Without: "
        "your own, a .jsonl or .parquet file or a Hub id; right is what equals the target (as many lines, case ignored); "
        "length_tokens is the mean",
    )
    add("--dataset_config", metavar="NAME", help="configuration of --dataset_name, of your own rows")
    add("--dataset_split", metavar="NAME", help="split of --dataset_name, of your own rows (default: test)")
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
    add("--babi_vocabulary", metavar="FILE", help="YAML or JSON file of other people, rooms, … for simulated stories")
    add(
        "--background_dir",
        metavar="PATH",
        help="books to hide the facts in, others than in training: a folder of .txt, a .txt or .jsonl file (default: "
        "built-in prose)",
    )
    add(
        "--background_dataset",
        metavar="NAME",
        help="books from a data set with column text instead: a Hub id or a path; its split of the name of --split, or a tenth "
        "of train, which training on it leaves out",
    )
    add("--repeat_background", action="store_true", help="begin again where the books end before a text is full")
    add(
        "--passkey_wording",
        default="plain",
        metavar="NAME",
        help="plain, landmark (the protocol of its paper: numbers 1 to 50000), longlora or infinitebench (default: plain)",
    )
    add(
        "--num_digits",
        type=int,
        default=5,
        metavar="N",
        help="of a pass key, as in training, but for landmark (default: 5)",
    )
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
    add_baselines(add)
    add_harness(add)
    add(
        "--depths",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="shares 0..1 of the text before the first fact, each measured by itself, and drawn in depths.png (default: any)",
    )
    add(
        "--stop_below",
        type=float,
        metavar="X",
        help="do not measure a model on longer texts of a task once its whole interval lies below this (0..1)",
    )
    add(
        "--scoring",
        default="official",
        metavar="RULE",
        help="of qa1 … qa20, memorize, detect_memorize, reasoning: official (BABILong's, where a target 'none' of qa7 never "
        "scores), strict (whole words, mends that), contains, exact (default: official); passkey, niah_single: first integer",
    )
    add("--output_dir", metavar="DIR", help="default: ADAPTER_PATH/evaluation, or ADAPTER_PATH/perplexity")
    add("--overwrite", action="store_true", help="replace an evaluation of other settings in --output_dir")
    parser.set_defaults(run=evaluate)


def add_harness(add):
    add(
        "--harness",
        nargs="+",
        metavar="NAME",
        help="tasks of lm-evaluation-harness instead of --task: babilong_qa1, niah_single_1, …; --lengths are then theirs",
    )
    add("--harness_data", metavar="DIR", help="of --harness: local files instead of the Hub, LENGTH/qa1.jsonl")
    add(
        "--harness_prompt",
        metavar="HOW",
        help="of --harness babilong_*: trained (context, question) or public (the harness' own) (default: trained)",
    )


def add_baselines(add):
    add(
        "--baseline",
        nargs="*",
        default=list(DEFAULT_BASELINES),
        metavar="NAME",
        help=f"any of {', '.join(BASELINES)} (default: {' '.join(DEFAULT_BASELINES)})",
    )
    add(
        "--rag_chunks", default="sentences", metavar="N", help="of rag: sentences, or tokens a passage, 512 (sentences)"
    )
    add("--rag_top_k", type=int, default=5, metavar="N", help="of rag: passages shown (default: 5)")
    add("--rag_order", default="document", metavar="HOW", help="of rag: document or similarity (default: document)")
    add("--rag_model", metavar="NAME", help="of rag: a sentence-transformers model ranks instead of BM25")
    add("--api_model", metavar="NAME", help="of api: model at $OPENAI_BASE_URL, asked with $OPENAI_API_KEY")
    add("--api_concurrency", type=int, default=8, metavar="N", help="of api: prompts in flight (default: 8)")
    add("--api_timeout", type=float, default=120.0, metavar="S", help="of api: seconds for an answer (default: 120)")
    add("--api_max_retries", type=int, default=6, metavar="N", help="of api: tries after the first (default: 6)")
    add(
        "--api_max_tokens",
        type=int,
        metavar="N",
        help="of api: tokens an answer may have, thoughts included (default: as all)",
    )
    add("--api_input_price", type=float, metavar="X", help="of api: of a million tokens in, for the cost estimate")
    add("--api_output_price", type=float, metavar="X", help="of api: of a million tokens out, for the cost estimate")


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


def add_score(commands):
    parser = commands.add_parser(
        "score", help="score public predictions again", description=SCORE, epilog=SCORE_EXAMPLES
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="predictions, at any depth")
    add_output(add, "default: nothing is written")
    parser.set_defaults(run=rescore)


def add_report(commands):
    parser = commands.add_parser(
        "report", help="several models' results side by side", description=REPORT, epilog=REPORT_EXAMPLES
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a results.json, a scores.json, or a folder that holds one")
    add("--task", nargs="+", default=[], metavar="NAME", help="passkey, qa1, … qa20, qa1-5 or dataset (default: all)")
    add("--names", nargs="+", default=[], metavar="NAME", help="of the paths, in their order (default: of the folders)")
    add("--scoring", default="official", metavar="RULE", help="of scores.json: official, strict, contains")
    add("--no_published", action="store_true", help="leave out the published figures")
    add_output(add, "default: runs/report", "runs/report")
    parser.set_defaults(run=report)


def add_output(add, help, default=None):
    add("--output_dir", metavar="DIR", default=default, help=help)
    add("--overwrite", action="store_true", help="replace the files of an earlier run in --output_dir")


def add_data(commands):
    parser = commands.add_parser("data", help="write samples to disk, or show one", description="Makes data sets.")
    parser.commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    build = parser.commands.add_parser(
        "build", help="write samples", description=DATA_BUILD, epilog=DATA_BUILD_EXAMPLES
    )
    add_generation(build.add_argument)
    add = build.add_argument
    add("--output_dir", required=True, metavar="DIR", help="new, empty, or of an earlier build with these settings")
    add(
        "--num_samples",
        type=int,
        default=100,
        metavar="N",
        help="samples of each task and length; of a bAbI file no more than it has, except for split train (default: 100)",
    )
    add("--format", default="parquet", metavar="NAME", help="parquet, jsonl or chat (default: parquet)")
    add(
        "--question_position",
        default="last",
        metavar="WHERE",
        help="of --format chat: last, first or both (default: last)",
    )
    add("--num_workers", type=int, default=1, metavar="N", help="processes; the files are the same (default: 1)")
    build.set_defaults(run=build_data)
    show = parser.commands.add_parser("show", help="print one sample", description=DATA_SHOW, epilog=DATA_SHOW_EXAMPLES)
    add_generation(show.add_argument)
    show.add_argument("--index", type=int, default=0, metavar="N", help="which sample (default: 0)")
    show.add_argument("--full", action="store_true", help="all of the background, not only what is near the facts")
    show.set_defaults(run=show_data)


def add_generation(add):
    add(
        "--task",
        nargs="+",
        required=True,
        metavar="NAME",
        help="qa1, … qa20, niah_single, memorize, detect_memorize, reasoning",
    )
    add("--lengths", nargs="+", required=True, metavar="N", help="in tokens: 0k, 1k, 4k, 1M, 10M, 1500 (1k = 1000)")
    add("--tokenizer", metavar="NAME", help="that counts tokens: a folder or Hub id (default: that of the tiny LLaMA)")
    add("--babi_dir", metavar="DIR", help="official bAbI files (qa1_test.txt, …); without it stories are simulated")
    add("--babi_vocabulary", metavar="FILE", help="YAML or JSON file of other people, rooms, … for simulated stories")
    add("--background_dir", metavar="PATH", help="books to hide the facts in: a folder of .txt, a .txt or .jsonl file")
    add(
        "--background_dataset",
        metavar="NAME",
        help="books from a data set with column text instead: a Hub id such as emozilla/pg19, streamed, or a path; its split "
        "of the name of --split, or a share of train (default: built-in prose)",
    )
    add("--repeat_background", action="store_true", help="begin again where the books end before a sample is full")
    add("--split", default="test", metavar="NAME", help="of the bAbI files: train, validation or test (default: test)")
    add("--seed", type=int, default=0, metavar="N", help="of stories, places and background (default: 0)")
    add("--task_start_pct", type=float, default=0.0, metavar="X", help="facts lie after this share of it (default: 0)")
    add("--task_end_pct", type=float, default=1.0, metavar="X", help="facts lie before this share of it (default: 1)")
    add("--depth", type=float, metavar="X", help="share 0..1 of the background before the first fact (default: any)")
    add("--max_n_facts", type=int, metavar="N", help="leave out bAbI stories with more facts than this")
    add(
        "--reserved_tokens",
        type=int,
        default=300,
        metavar="N",
        help="of a length, kept for question and answer (default: 300, as in the public sets)",
    )


def evaluate(options):
    harness = {name: options.pop(name) for name in ("harness", "harness_data", "harness_prompt")}
    if any(harness.values()):
        return evaluate_harness(options, **harness)
    options.update({name: tuple(options[name]) for name in ("lengths", "baseline", "depths")})
    options["task"] = tuple(name for names in options["task"] for name in names.split(",") if name)
    settings = EvaluationSettings(**options)
    quiet_libraries()
    if settings.measures_perplexity:
        from lrmt.evaluation.perplexity import run_perplexity

        run_perplexity(settings)
    else:
        from lrmt.evaluation.run import run_evaluation

        run_evaluation(settings)


def evaluate_harness(options, harness, harness_data, harness_prompt):
    default = build_parser()[1]["evaluate"].get_default
    others = [f"--{name}" for name, value in options.items() if name not in OF_HARNESS and value != default(name)]
    if harness is None or others:
        got = "--harness_data or --harness_prompt alone" if harness is None else f"{', '.join(others)} too"
        raise UsageError(
            f"--harness NAME… stands alone, with --harness_data, --harness_prompt and {', '.join(OF_HARNESS)}; got {got}"
        )
    quiet_libraries()
    from lrmt.evaluation.harness.run import run_harness

    reading = {name: options[name] for name in ("load_in_4bit", *READING) if options[name] is not None}
    run_harness(
        options["adapter_path"],
        harness,
        max_seq_lengths=options["lengths"],
        num_samples=options["num_samples"],
        batch_size=options["batch_size"],
        data_dir=harness_data,
        prompt=harness_prompt or "trained",
        output_dir=options["output_dir"],
        overwrite=options["overwrite"],
        seed=options["seed"],
        **reading,
    )


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


def rescore(options):
    from lrmt.evaluation.babilong.rescoring import score_folder

    score_folder(**options)


def report(options):
    from lrmt.evaluation.report import run_report

    run_report(**options)


def build_data(options):
    quiet_libraries()
    from lrmt.data.settings import BuildSettings
    from lrmt.data.write import build

    options.update(task=tuple(options["task"]), lengths=tuple(options["lengths"]))
    files = build(BuildSettings(**options))
    print(f"{len(files)} files are in {options['output_dir']}; load them with")
    print(f'  datasets.load_dataset("{options["output_dir"]}", "{files[0].parent.name}", split="{options["task"][0]}")')


def show_data(options):
    quiet_libraries()
    from lrmt.data.settings import ShowSettings
    from lrmt.data.show import show

    show(ShowSettings(**options | {"task": tuple(options["task"]), "lengths": tuple(options["lengths"])}))


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


def parse(argv) -> dict:
    """Options by name; whatever is mistyped ends here with a suggestion, before argparse misses what it should have been."""
    parser, commands = build_parser()
    at, words = parser, list(argv)
    while commands and words and not words[0].startswith("-"):
        if words[0] not in commands:
            at.error(f"no command {words[0]!r}{suggest(words[0], commands)}")
        at = commands[words.pop(0)]
        commands = getattr(at, "commands", None) and at.commands.choices
    if at is not parser:
        flags = at._option_string_actions
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            if flag not in flags:
                at.error(f"no flag {flag}{suggest(flag, flags)}")
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
