"""`lrmt inspect`: which blocks of a text each token of a landmark model's answer read, as passages."""

import contextlib
from collections import Counter

import numpy as np
import torch

from lrmt.errors import UsageError
from lrmt.evaluation.contenders import decode_answer, pad_token_id
from lrmt.evaluation.inspection import InspectionSettings
from lrmt.evaluation.plots import draw_retrieval
from lrmt.evaluation.run import load_on_device, load_tokenizer, read_config
from lrmt.files import to_json, write_whole
from lrmt.tasks.base import Pieces

LONGEST_PASSAGE = 100  # characters shown


def run_inspection(settings: InspectionSettings) -> list[dict]:
    """Reads, answers, writes retrieval.json and retrieval.png, prints what was read; returns the records.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError).
    """
    config = read_config(settings.adapter_path)
    if config.model_type != "landmark":
        raise UsageError(
            f"--adapter_path {settings.adapter_path} is a model of type {config.model_type}, which reads no blocks; give a "
            "landmark adapter"
        )
    tokenizer = load_tokenizer(settings.adapter_path)
    document, prompt = split_text(settings, tokenizer, config.block_length)
    model = load_on_device(settings)
    with writing_to(settings.folder):
        settings.folder.mkdir(parents=True, exist_ok=True)
    answer, steps = answer_and_record(model, tokenizer, document, prompt, settings.max_new_tokens)
    tokens = [tokenizer.decode([token]) for token in answer]
    records = build_records(steps, tokens, config.block_length)
    with writing_to(settings.folder):
        write_whole(settings.folder / "retrieval.json", to_json(records))
        if records:
            shares, blocks = average_shares(records, config.num_hidden_layers, len(answer))
            write_whole(settings.folder / "retrieval.png", draw_retrieval(shares, blocks))
        else:  # of an inspection that this one replaces
            (settings.folder / "retrieval.png").unlink(missing_ok=True)

    print(f"answer: {decode_answer(answer, tokenizer)!r}\n")
    if not records:
        print(f"no block was retrieved: the text, {len(document) + len(prompt)} tokens, is shorter than what is near")
        return records
    print(f"{format_tokens_read(records, tokens, config.num_hidden_layers, settings.top)}\n")
    print(f"{format_passages(records, document + prompt + answer, tokenizer, config, settings.top)}\n")
    print(f"retrieval.json and retrieval.png are in {settings.folder}")
    return records


@contextlib.contextmanager
def writing_to(folder):
    try:
        yield
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written ({error.strerror}); name another") from None


def split_text(settings: InspectionSettings, tokenizer, block_length: int) -> tuple[list[int], list[int]]:
    """Ids of the document and of the prompt, which is the question, or the last token of the text.

    One token, because all that a prompt holds is read at once: whatever stands in it is near, and not retrieved.
    """
    encode = Pieces(tokenizer).encode  # as in training
    document = encode([settings.text])[0].tolist()
    if len(document) < block_length - 1:
        raise UsageError(
            f"--input {settings.input} is shorter than one block: {len(document)} tokens, a block holds {block_length - 1}; "
            "give a longer text"
        )
    if settings.question is not None:
        return document, encode([settings.question])[0].tolist()
    if len(document) == 1:
        raise UsageError(f"--input {settings.input} is a single token; give a longer text, or a --question")
    return document[:-1], document[-1:]


def answer_and_record(model, tokenizer, document: list[int], prompt: list[int], max_new_tokens: int):
    """The ids of the greedy answer, and for each of them what `generate` says it read."""
    device = model.device
    state = model.read(torch.tensor([document], device=device))
    prompt_ids = torch.tensor([prompt], device=device)
    ids, steps = model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        state=state,
        return_retrieval=True,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id(tokenizer),
    )
    answer = ids[0, len(prompt) :].tolist()
    return answer, steps


def build_records(steps: list[dict], tokens: list[str], block_length: int) -> list[dict]:
    """One record for each answer token, layer and block that a head chose; `share` (0..1) is the mean over all heads.

    Args:
        steps: for each answer token `{(0, layer): (blocks [H, k], shares [H, k])}`. tokens: their texts.
    """
    records = []
    for number, (token, step) in enumerate(zip(tokens, steps, strict=True)):
        for (_, layer), (blocks, shares) in sorted(step.items()):
            for block in blocks[blocks >= 0].unique().tolist():
                records.append(
                    {
                        "answer_token": number,
                        "text": token,
                        "layer": layer,
                        "block": block,
                        "share": float(shares[blocks == block].sum()) / len(blocks),
                        "start_token": block * (block_length - 1),
                    }
                )
    return records


def score_blocks(records: list[dict], num_layers: int) -> Counter:
    """Blocks with their shares, averaged over layers and heads and summed over the records' answer tokens."""
    scores = Counter()
    for record in records:
        scores[record["block"]] += record["share"] / num_layers
    return scores


def average_shares(records: list[dict], num_layers: int, num_tokens: int) -> tuple[np.ndarray, list[int]]:
    """Shares `[layers, blocks]`, averaged over heads and answer tokens, and the numbers of the blocks, those read only."""
    blocks = sorted({record["block"] for record in records})
    column = {block: i for i, block in enumerate(blocks)}
    shares = np.zeros((num_layers, len(blocks)))
    for record in records:
        shares[record["layer"], column[record["block"]]] += record["share"] / num_tokens
    return shares, blocks


def format_tokens_read(records: list[dict], tokens: list[str], num_layers: int, top: int) -> str:
    """A line for each answer token: its best blocks, each with its score."""
    shown = [repr(token) for token in tokens]
    width = max(map(len, shown))
    lines = ["blocks that each answer token read: share of its attention in %, mean over layers and heads"]
    for number, token in enumerate(shown):
        scores = score_blocks([r for r in records if r["answer_token"] == number], num_layers)
        best = "   ".join(f"{block}: {100 * score:.1f}" for block, score in scores.most_common(top))
        lines.append(f"  {token:<{width}}   {best or 'none'}")
    return "\n".join(lines)


def format_passages(records: list[dict], ids: list[int], tokenizer, config, top: int) -> str:
    """The best blocks of the whole answer, their scores summed over its tokens, and their passages."""
    lines = ["the same, summed over the answer"]
    for block, score in score_blocks(records, config.num_hidden_layers).most_common(top):
        passage = shorten(read_passage(ids, block, config.block_length, tokenizer))
        lines.append(f"{block:>8}: {100 * score:<6.1f}  {passage}")
    return "\n".join(lines)


def read_passage(ids: list[int], block: int, block_length: int, tokenizer) -> str:
    """The text of a block: every `block_length`-th position is a landmark and no token of the text `ids`."""
    return tokenizer.decode(ids[block * (block_length - 1) : (block + 1) * (block_length - 1)])


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_PASSAGE else text[: LONGEST_PASSAGE - 1] + "…"
