"""What a recurrent memory says after every segment, in words: what it was told, what it kept, and what it lost."""

from __future__ import annotations

from collections import Counter
from difflib import SequenceMatcher
from itertools import groupby, pairwise

import numpy as np
from torch import Tensor

from lrmt.evaluation.plots import draw_attention, draw_memory
from lrmt.files import to_json
from lrmt.models import Recording, Written
from lrmt.tasks.base import Pieces

SURE = 0.5  # what a vector says with this probability counts as said
PANELS = 3  # segments whose writing is drawn


def tell_memory(told: Recording, ids: list[int], answer: list[int], tokenizer, notes: list[str], top: int) -> dict:
    """Prints what the memory said while the text `ids` was read, what of the `notes` it kept, and how the `answer`, the end of the
    text, looked at it; the files, by name.
    """
    segments, followed, panels, files = [], [], [], {}
    if any((written.ids >= 0).any() for written in told.written):
        segments = tell_segments(told, ids, tokenizer, top)
        print(f"{format_segments(segments)}\n")
        followed = [follow(note, [*map(sure_ids, told.written)], tokenizer) for note in notes]
        if followed:
            print("\n".join(map(format_note, followed)) + "\n")
        panels = [
            draw_writing(told.written[n - 1], segments[n - 1], ids, tokenizer) for n in most_telling(segments, followed)
        ]
        probability = [np.where(to_numpy(one.ids) < 0, np.nan, to_numpy(one.probability)) for one in told.written]
        says = [[vector["says"] for vector in segment["vectors"]] for segment in segments]
        files["memory.png"] = draw_memory(stack(probability), says, SURE, followed)
    elif told.written:
        print("this memory is not made of vectors that the head could read\n")
    else:
        length = len(ids) - len(answer)
        print(
            f"nothing was written to memory: the text, {length} tokens, is but one segment; give more, or a --question\n"
        )
    looked = [to_numpy(shares).tolist() for shares in told.looked]
    answered = [
        {"text": tokenizer.decode([token]), "looked": shares} for token, shares in zip(answer, looked, strict=True)
    ]
    if any(looked):
        print(f"{format_looks(answered, top)}\n")
    if any(looked) or panels:
        files["attention.png"] = draw_attention(panels, stack(looked), [part["text"] for part in answered])
    return {"memory.json": to_json({"segments": segments, "notes": followed, "answer": answered}), **files}


def draw_writing(written: Written, segment: dict, ids: list[int], tokenizer) -> tuple:
    """What `draw_attention` takes of a segment: what the positions that wrote a vector looked at."""
    read = ids[segment["start_token"] :][: segment["tokens"]]
    wrote = [i for i, vector in enumerate(segment["vectors"]) if vector["says"] is not None]
    rows = [f"{i + 1}:{segment['vectors'][i]['says']}" for i in wrote]
    title = f"segment {segment['segment']}"
    return title, to_numpy(written.looked)[wrote], rows, [tokenizer.decode([token]) for token in read]


def stack(rows: list) -> np.ndarray:
    """Rows of numbers as one table, as wide as the longest, with NaN behind the others."""
    table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def most_telling(segments: list[dict], notes: list[dict]) -> list[int]:
    """Numbers of a few segments: where notes were said first, and where most was said that was not before."""
    first = [note["said"][0][0] for note in notes if note["said"]]
    gain = {segment["segment"]: sum(map(len, segment["gained"])) for segment in segments if segment["gained"]}
    most = sorted(gain, key=gain.get, reverse=True)
    return sorted(list(dict.fromkeys(first + most))[:PANELS])


def to_numpy(shares: Tensor) -> np.ndarray:
    """Of the one row that there is."""
    return shares[0].float().cpu().numpy()


def tell_segments(told: Recording, ids: list[int], tokenizer, top: int) -> list[dict]:
    """For every segment: what each vector says and looked at, and what is said that was not before, and no more that was."""
    records, before, start = [], [], 0
    for number, written in enumerate(told.written, start=1):
        size, said = written.looked.shape[-1], sure_ids(written)
        gained, lost = changes(before, said)
        records.append(
            {
                "segment": number,
                "start_token": start,
                "tokens": size,
                "gained": [tokenizer.decode(run) for run in gained],
                "lost": [tokenizer.decode(run) for run in lost],
                "vectors": [
                    {
                        "says": tokenizer.decode([token]) if token >= 0 else None,
                        "probability": probability,
                        "looked": [
                            {
                                "token": start + place,
                                "text": tokenizer.decode([ids[start + place]]),
                                "share": float(shares[place]),
                            }
                            for place in shares.argsort(descending=True)[: top if token >= 0 else 0].tolist()
                        ],
                    }
                    for token, probability, shares in zip(
                        written.ids[0].tolist(), written.probability[0].tolist(), written.looked[0], strict=True
                    )
                ],
            }
        )
        before, start = said, start + size
    return records


def sure_ids(written: Written) -> list[int | None]:
    """What each vector that a position wrote says; None where it is not sure."""
    says = zip(written.ids[0].tolist(), written.probability[0].tolist(), strict=True)
    return [token if p >= SURE else None for token, p in says if token >= 0]


def changes(before: list[int | None], after: list[int | None]) -> tuple[list[list[int]], list[list[int]]]:
    """What has come and what has gone from what was said to what is, as runs of tokens; what only moved has done neither."""
    gained, lost = [], []
    for kind, a, b, c, d in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if kind != "equal":
            lost += [*before[a:b], None]
            gained += [*after[c:d], None]
    moved = Counter(gained) & Counter(lost)
    return split_runs(gained, moved), split_runs(lost, moved)


def split_runs(tokens: list[int | None], moved: Counter) -> list[list[int]]:
    """Runs of tokens, ended by None and by what `moved`, each as often as that tells."""
    left, stayed = moved.copy(), []
    for token in tokens:
        stayed.append(None if left[token] else token)
        left[token] -= left[token] > 0
    return [list(run) for some, run in groupby(stayed, lambda token: token is not None) if some]


def follow(note: str, said: list[list[int | None]], tokenizer) -> dict:
    """In which segments a note was said, `[first, last]` of each stretch; of a note longer than the memory its beginning."""
    ids = Pieces(tokenizer)(note).tolist()[: max(map(len, said))]
    told = [
        any(tokens[i : i + len(ids)] == ids for i in range(len(tokens) - len(ids) + 1)) for tokens in [[], *said, []]
    ]
    begins = [s for s, (a, b) in enumerate(pairwise(told), start=1) if b and not a]
    ends = [s - 1 for s, (a, b) in enumerate(pairwise(told), start=1) if a and not b]
    return {"note": note, "said": [list(stretch) for stretch in zip(begins, ends, strict=True)], "segments": len(said)}


def format_note(note: dict) -> str:
    """One line: where a note was said first, and where it was lost."""
    words = []
    for first, last in note["said"]:
        words.append(f"said {'again' if words else 'first'} after segment {first}")
        words.append("kept to the end" if last == note["segments"] else f"lost in segment {last + 1}")
    return f"note {note['note']!r}: {', '.join(words) or 'never said'}"


def format_segments(segments: list[dict]) -> str:
    """A line for every segment, or for several together where the same is said at the same places."""
    lines = [
        f"what the memory says: the likeliest token of each vector, its probability in %; said from {SURE:.0%}; "
        "-: none, or several in turn"
    ]
    runs: list[list[dict]] = []
    for segment in segments:
        if not runs or segment["gained"] or segment["lost"] or said_where(segment) != said_where(runs[-1][0]):
            runs.append([])
        runs[-1].append(segment)
    for run in runs:
        first, last = run[0]["segment"], run[-1]["segment"]
        vectors = map(format_vector, zip(*(segment["vectors"] for segment in run), strict=True))
        marks = [f"+{text!r}" for text in run[0]["gained"]] + [f"-{text!r}" for text in run[0]["lost"]]
        where = f"{first}" if first == last else f"{first}-{last}"
        lines.append(f"{where:>9}   {'  '.join(vectors)}   {' '.join(marks)}".rstrip())
    if not any(segment["gained"] for segment in segments):
        lines.append("no vector ever says anything surely: a memory trained without notes need not be readable")
    return "\n".join(lines)


def said_where(segment: dict) -> list[str | None]:
    """What is said, vector by vector."""
    return [vector["says"] if vector["probability"] >= SURE else None for vector in segment["vectors"]]


def format_vector(in_segments: tuple[dict, ...]) -> str:
    """What a vector says in several segments, and the least of its probabilities."""
    says = {vector["says"] for vector in in_segments}
    if len(says) > 1 or None in says:
        return "-"
    return f"{says.pop()!r} {100 * min(vector['probability'] for vector in in_segments):.0f}"


def format_looks(answered: list[dict], top: int) -> str:
    """A line for each answer token: the vectors of memory that it looked at most."""
    lines = ["how each answer token looked at the memory: share of its attention in %, mean over layers and heads"]
    width = max((len(repr(part["text"])) for part in answered), default=0)
    for part in answered:
        shares = np.array(part["looked"])
        best = "   ".join(f"{i + 1}: {100 * shares[i]:.1f}" for i in np.argsort(-shares)[:top])
        lines.append(f"  {part['text']!r:<{width}}   all: {100 * shares.sum():.1f}   {best}")
    return "\n".join(lines)
