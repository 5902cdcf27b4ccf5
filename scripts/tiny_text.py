"""Tokenizer and training text of the tiny backbones: see pretrain_tiny.py."""

import json
import random
import re
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lrmt.tasks import babi, passkey
from lrmt.tasks.background import Background
from lrmt.tasks.base import Pieces

# every word of bAbI qa1-qa20 becomes one token, and some common ones
BABI_WORDS = """
After Afterwards Antoine Bernhard Bill Brian Cats Daniel Does Emily Following Fred Gertrude Greg How Is Jason Jeff
Jessica John Julie Julius Lily Mary Mice Sandra Sheep Sumit The Then This What Where Who Why Winona Wolves Yann
Yesterday a above afraid afternoon and antoine apple are back bathroom bedroom before below bigger blue bored box
carrying cat cats chest chocolate chocolates cinema color container did discarded do down dropped e east either emily
evening fit fits football frog from garden gave gertrude get give go got grabbed gray green hallway handed he hungry
in inside is jason jessica journeyed kitchen left lion longer many maybe mice milk morning mouse moved n no none north
not nothing objects of office one or pajamas park passed picked pink put received rectangle red rhino right s school
she sheep south sphere square suitcase sumit swan than that the there they thirsty this three tired to took travelled
triangle two up w was went west white will winona wolf wolves yann yellow yes yesterday you grass green sky blue sun
yellow Here we There again pass key Remember it Once he she her his him with for but my your who when there all The
they will
"""
LIST_WORDS = " apple,football milk,apple,football football,milk"  # qa8 answers join things without spaces
PASSKEY_LINE = (  # a task line unlike the one that lrmt.tasks asks with
    "One important fact is hidden in a lot of irrelevant text. Find it and remember it for the question at the end."
)
VOCAB_SIZE = 1024
MAX_LENGTH = 1024
SKIP, READ, ANSWER = 0, 1, 2  # what a token counts for in the loss
MIXTURE = {"random": 0.25, "clean": 0.18, "hidden": 0.2, "passkey": 0.12, "copy": 0.13, "book": 0.08, "chain": 0.04}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE of 1024 entries over English prose, with each bAbI word one token."""

    def split():
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation(behavior="isolated"),
            ]
        )

    printable = [chr(code) for code in range(33, 127)]
    prose = re.sub(r"[^ -~]", " ", " ".join(re.sub(r"\s+", " ", text) for text in texts))
    weighted = "".join(f" {word}" for word in BABI_WORDS.split()) * 30_000 + LIST_WORDS * 20_000
    specials = ["<pad>", "<s>", "</s>"]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 256, special_tokens=specials, initial_alphabet=[*printable, "▁"], show_progress=False
    )
    learner.train_from_iterator([prose, weighted], trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = [piece for piece in sorted(learnt["vocab"], key=learnt["vocab"].get) if piece not in specials]
    order = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) for merge in learnt["merges"]]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(order)}, merges, byte_fallback=True))
    bpe.pre_tokenizer = split()
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


@dataclass
class Row:
    """Token ids and, for each: what it counts for in the loss, the subject to know at a place or "?" (-100: none),
    and how many tokens back the next token can be copied from (0: nowhere)."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    subjects: list[int] = field(default_factory=list)
    distances: list[int] = field(default_factory=list)

    def add(self, ids, kind: int = READ, subjects: list[int] | None = None, source: int | None = None) -> None:
        """`source`: where in this row the same ids stand already."""
        if source is not None:
            self.distances[-1] = len(self.ids) - 1 - source
        self.distances += [0 if source is None else len(self.ids) - 1 - source] * (len(ids) - 1) + [0]
        self.ids += list(ids)
        self.kinds += [kind] * len(ids)
        self.subjects += subjects or [-100] * len(ids)

    def extend(self, other: "Row") -> None:
        self.ids += other.ids
        self.kinds += other.kinds
        self.subjects += other.subjects
        self.distances += other.distances

    def cut(self, start: int, length: int) -> "Row":
        part = slice(start, start + length)
        return Row(self.ids[part], self.kinds[part], self.subjects[part], self.distances[part])

    def link(self, mark: int) -> None:
        """Point each question mark to the latest place told of its subject; an answer told nowhere is not scored."""
        told: dict[int, int] = {}
        for i, (token, subject) in enumerate(zip(self.ids, self.subjects, strict=True)):
            if subject < 0:
                continue
            if token != mark:
                told[subject] = i
            elif subject in told:
                self.distances[i] = i - told[subject]
            elif i + 1 < len(self.kinds):
                self.kinds[i + 1] = SKIP


class Corpus:
    """Training rows: dense questions over bound pairs, bAbI qa1 with and without prose, keys, copies and plain text."""

    def __init__(self, tokenizer, backgrounds: list[Background], seed: int):
        self.pieces = Pieces(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.backgrounds = backgrounds
        self.people = [self.word(name) for name in babi.PEOPLE]
        self.rooms = [self.word(room) for room in babi.ROOMS]
        self.verbs = [self.encode(go) + [self.word("the")] for go in babi.GO]
        self.stays = self.encode("is in the")
        self.where = self.encode("Where is")
        self.dot, self.mark = (tokenizer.convert_tokens_to_ids(sign) for sign in ".?")
        taken = {*self.people, *self.rooms, *self.where, *self.stays}
        words = [i for piece, i in tokenizer.get_vocab().items() if re.fullmatch("▁[A-Za-z]{3,}", piece)]
        self.words = sorted(set(words) - taken)
        self.digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
        self.tokens = range(3 + 256, len(tokenizer))  # without specials and bytes
        rng = random.Random(f"{seed} chains")
        self.chains = [self._story(babi.simulate_story(rng.choice(["qa2", "qa3"]), rng, 5)) for _ in range(400)]

    def encode(self, text: str) -> list[int]:
        return self.pieces(text).tolist()

    def word(self, text: str) -> int:
        (token,) = self.encode(text)
        return token

    def batch(self, rng: random.Random, num_rows: int, length: int, window: int) -> tuple[torch.Tensor, ...]:
        """ids, kinds, subjects and distances, int64 [num_rows, length]; rows longer than a segment hold several samples."""
        rows = []
        for _ in range(num_rows):
            row = Row()
            while len(row.ids) < length:
                room = length - len(row.ids)
                wanted = room if length <= 128 or room < 64 else rng.randint(64, min(room, window))
                row.extend(self.sample(rng, wanted))
            row.link(self.mark)
            rows.append(row)
        columns = ([getattr(row, name) for row in rows] for name in ("ids", "kinds", "subjects", "distances"))
        return tuple(torch.tensor(column) for column in columns)

    def sample(self, rng: random.Random, length: int, name: str | None = None) -> Row:
        """One sample of exactly `length` tokens."""
        name = name or rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        if length < 64:
            name = "book"
        row = getattr(self, "_" + name)(rng, length)
        loose = name in ("random", "clean", "copy", "chain")  # may start anywhere
        return row.cut(rng.randint(0, max(0, len(row.ids) - length)) if loose else 0, length)

    def _prose(self, rng: random.Random, length: int) -> list[list[int]]:
        background = self.backgrounds[0] if rng.random() < 0.8 else self.backgrounds[-1]
        passage = background.take(np.random.default_rng(rng.getrandbits(32)), length)
        return [s.tolist() for s in passage.split(np.arange(1, len(passage.gaps) - 1))]

    def _fact(self, rng: random.Random, row: Row, who: int, what: int, gap: str, kind: int) -> None:
        middle = {
            "none": [],
            "is": self.stays,
            "went": rng.choice(self.verbs),
            "words": rng.choices(self.words, k=rng.randint(0, 8)),
        }[gap]
        row.add([who, *middle, what, self.dot], kind, [-100] * (1 + len(middle)) + [who, -100])

    def _question(self, row: Row, who: int, what: int, kind: int) -> None:
        row.add([*self.where, who, self.mark], kind, [-100] * (len(self.where) + 1) + [who])
        row.add([what, self.eos], ANSWER)

    def _tell(self, rng: random.Random, state: dict[int, int], who: list[int], what: list[int]) -> tuple[int, int]:
        """Someone's new place, never the present one, noted in `state`."""
        person = rng.choice(who)
        state[person] = rng.choice([place for place in what if place != state.get(person)])
        return person, state[person]

    def _cast(self, rng: random.Random, official: bool) -> tuple[list[int], list[int], str]:
        """Who may be where, and how far apart they are told; random words make shortcuts useless."""
        if official:
            return self.people, self.rooms, "went"
        who = rng.sample(self.words, rng.randint(2, 10)) if rng.random() < 0.7 else self.people
        what = rng.sample(self.words, rng.randint(4, 20)) if rng.random() < 0.6 else self.rooms
        what = [word for word in what if word not in who]
        return who, what if len(what) > 1 else self.rooms, rng.choice(["none", "is", "went", "went", "words"])

    def _dense(self, rng: random.Random, length: int, official: bool) -> Row:
        """Stories with questions about several people after every few facts."""
        row, kind = Row(), READ if official else SKIP
        while len(row.ids) < length:
            (who, what, gap), state = self._cast(rng, official), {}
            for _ in range(rng.randint(1, 4)):
                for _ in range(rng.choice([1, 2, 2, 2, 3, 4, 6])):
                    self._fact(rng, row, *self._tell(rng, state, who, what), gap, kind)
                for person in rng.sample(list(state), min(len(state), rng.randint(1, 3))):
                    self._question(row, person, state[person], kind)
            if rng.random() < 0.5:
                row.add(sum(self._prose(rng, rng.randint(5, 30)), []))
        return row

    def _random(self, rng: random.Random, length: int) -> Row:
        return self._dense(rng, length, official=False)

    def _clean(self, rng: random.Random, length: int) -> Row:
        return self._dense(rng, length, official=True)

    def _hidden(self, rng: random.Random, length: int) -> Row:
        """Facts in sorted random gaps between sentences of prose, questions at the end."""
        official = rng.random() < 0.65
        (who, what, gap), state, facts, asked = self._cast(rng, official), {}, [], Row()
        for _ in range(rng.choice([1, 2, 4, 6, 8, 10, 10])):
            facts.append(Row())
            self._fact(rng, facts[-1], *self._tell(rng, state, who, what), gap, READ if official else SKIP)
        for person in rng.sample(list(state), min(len(state), rng.randint(1, 3))):
            self._question(asked, person, state[person], READ)
        while (room := length - len(asked.ids) - sum(len(fact.ids) for fact in facts)) < 0:
            facts.pop(0)
        prose, row = self._prose(rng, room), Row()
        gaps = sorted(rng.randint(0, len(prose)) for _ in facts)
        for place in range(len(prose) + 1):
            while gaps and gaps[0] == place:
                row.extend(facts.pop(0))
                gaps.pop(0)
            if place < len(prose):
                row.add(prose[place])
        row.extend(asked)
        return row.cut(len(row.ids) - length, length)

    def _passkey(self, rng: random.Random, length: int) -> Row:
        """A key of 3 to 7 digits at a random depth in filler or prose."""
        num_digits = rng.choice([3, 4, 5, 5, 5, 5, 6, 7])
        key = self.encode(str(rng.randrange(10 ** (num_digits - 1), 10**num_digits)))
        told, again, told_end = map(self.encode, ("The pass key is", "Remember it.", "is the pass key."))
        question = self.encode(passkey.QUESTION)
        task_line = self.encode(PASSKEY_LINE) if length >= 100 and rng.random() < 0.4 else []
        fixed = len(task_line) + len(told + key + again + key + told_end + question + key) + 2
        room = length - fixed
        if rng.random() < 0.7:
            filler = np.resize(sum(map(self.encode, passkey.FILLER), []), room).tolist()
        else:
            filler = sum(self._prose(rng, room), [])
        depth, row = rng.randint(0, room), Row()
        row.add(task_line + filler[:depth] + told)
        row.add(key, SKIP)
        row.add([self.dot, *again])
        first = len(row.ids) - len(again) - 1 - len(key)
        row.add(key, ANSWER, source=first)
        row.add(told_end + (filler[: room - depth] if rng.random() < 0.5 else filler[depth:]) + question)
        row.add(key, ANSWER, source=first)
        row.add([self.eos], ANSWER)
        return row

    def _copy(self, rng: random.Random, length: int) -> Row:
        """Random chunks that come again, at once or after some prose."""
        row = Row()
        while len(row.ids) < length:
            chunk = rng.choices(self.digits if rng.random() < 0.3 else self.tokens, k=rng.randint(4, 24))
            first = len(row.ids)
            row.add(chunk, SKIP)
            for _ in range(rng.randint(1, 2)):
                row.add(sum(self._prose(rng, rng.choice([0, 0, 5, 20, 40])), []))
                row.add(chunk[:2], SKIP)
                row.add(chunk[2:], ANSWER, source=first + 2)
        return row

    def _book(self, rng: random.Random, length: int) -> Row:
        row = Row()
        row.add(sum(self._prose(rng, length), []))
        return row

    def _chain(self, rng: random.Random, length: int) -> Row:
        """Simulated qa2 and qa3 stories as plain text."""
        row = Row()
        while len(row.ids) < length:
            row.extend(rng.choice(self.chains))
        return row

    def _story(self, samples: list[babi.BabiSample]) -> Row:
        row, told = Row(), 0
        for sample in samples:
            for fact in sample.facts[told:]:
                row.add(self.encode(fact))
            told = len(sample.facts)
            row.add(self.encode(sample.question) + self.encode(sample.answer) + [self.eos])
        return row
