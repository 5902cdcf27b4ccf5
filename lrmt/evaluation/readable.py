"""What a recurrent memory says after every segment, in words: what it was told, what it kept, and what it lost."""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
from torch import Tensor

from lrmt.evaluation.plots import draw_attention, draw_memory
from lrmt.files import to_json
from lrmt.models import Recording
from lrmt.tasks.base import Pieces

SURE = 0.5  # what a vector says with this probability counts as said
PANELS = 3  # segments whose writing is drawn


def tell_memory(told: Recording, ids: list[int], answer: list[int], tokenizer, notes: list[str], top: int) -> dict:
    """Prints what the memory said while the text `ids` was read, what of the `notes` it kept, and how the `answer`, the end of the
    text, looked at it; the files, by name.
    """
    if not len(told.written[0].ids[0]):
        print("this memory is not made of vectors that the head could read\n")
        return {"memory.json": to_json({"segments": [], "notes": [], "answer": []})}
    segments = tell_segments(told, ids, tokenizer, top)
    said = [sure_ids(written.ids[0], written.probability[0]) for written in told.written]
    notes = [follow(note, said, tokenizer) for note in notes]
    looked = np.stack([to_numpy(shares) for shares in told.looked])
    answered = [
        {"text": tokenizer.decode([token]), "looked": row.tolist()} for token, row in zip(answer, looked, strict=True)
    ]
    print(f"{format_segments(segments)}\n")
    if notes:
        print("\n".join(map(format_note, notes)) + "\n")
    print(f"{format_looks(answered, top)}\n")
    tokens = [[vector["says"] for vector in segment["vectors"]] for segment in segments]
    panels = []
    for number in most_telling(segments, notes):
        read = ids[segments[number - 1]["start_token"] :][: segments[number - 1]["tokens"]]
        columns = [tokenizer.decode([token]) for token in read]
        panels.append((f"segment {number}", to_numpy(told.written[number - 1].looked), tokens[number - 1], columns))
    return {
        "memory.json": to_json({"segments": segments, "notes": notes, "answer": answered}),
        "memory.png": draw_memory(
            np.stack([to_numpy(written.probability) for written in told.written]), tokens, SURE, notes
        ),
        "attention.png": draw_attention(panels, looked, [part["text"] for part in answered]),
    }


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
        size = written.looked.shape[-1]
        said = sure_ids(written.ids[0], written.probability[0])
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
                        "says": tokenizer.decode([token]),
                        "probability": probability,
                        "looked": [
                            {
                                "token": start + place,
                                "text": tokenizer.decode([ids[start + place]]),
                                "share": float(shares[place]),
                            }
                            for place in shares.argsort(descending=True)[:top].tolist()
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


def sure_ids(ids: Tensor, probability: Tensor) -> list[int | None]:
    """What each vector says, `[k]`; None where it is not sure."""
    return [token if p >= SURE else None for token, p in zip(ids.tolist(), probability.tolist(), strict=True)]


def changes(before: list[int | None], after: list[int | None]) -> tuple[list[list[int]], list[list[int]]]:
    """What has come and what has gone from what was said to what is, as runs of tokens; what only moved has done neither."""
    gained, lost = [], []
    for _, a, b, c, d in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if before[a:b] != after[c:d]:
            lost.append([token for token in before[a:b] if token is not None])
            gained.append([token for token in after[c:d] if token is not None])
    return [run for run in gained if run], [run for run in lost if run]


def follow(note: str, said: list[list[int | None]], tokenizer) -> dict:
    """In which segments a note was said, `[first, last]` of each stretch; of a note longer than the memory its beginning."""
    ids = Pieces(tokenizer)(note).tolist()[: len(said[0])]
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
    """A line for every segment, or for several together where the same is said."""
    lines = [f"what the memory says: the likeliest token of each vector, its probability in %; said from {SURE:.0%}"]
    runs: list[list[dict]] = []
    for segment in segments:
        if runs and not segment["gained"] and not segment["lost"]:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    for run in runs:
        first, last = run[0]["segment"], run[-1]["segment"]
        vectors = [
            f"{vector['says']!r} {100 * min(s['vectors'][i]['probability'] for s in run):.0f}"
            for i, vector in enumerate(run[0]["vectors"])
        ]
        marks = [f"+{text!r}" for text in run[0]["gained"]] + [f"-{text!r}" for text in run[0]["lost"]]
        where = f"{first}" if first == last else f"{first}-{last}"
        lines.append(f"{where:>9}   {'  '.join(vectors)}   {' '.join(marks)}".rstrip())
    if not any(segment["gained"] for segment in segments):
        lines.append("no vector ever says anything surely: a memory trained without notes need not be readable")
    return "\n".join(lines)


def format_looks(answered: list[dict], top: int) -> str:
    """A line for each answer token: the vectors of memory that it looked at most."""
    lines = ["how each answer token looked at the memory: share of its attention in %, mean over layers and heads"]
    width = max((len(repr(part["text"])) for part in answered), default=0)
    for part in answered:
        shares = np.array(part["looked"])
        best = "   ".join(f"{i + 1}: {100 * shares[i]:.1f}" for i in np.argsort(-shares)[:top])
        lines.append(f"  {part['text']!r:<{width}}   all: {100 * shares.sum():.1f}   {best}")
    return "\n".join(lines)
