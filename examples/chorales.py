"""One to many: chorales in four voices, learned from Bach's and written anew.

The scores are those that the package music21 carries. A chorale is a line of tokens: for every eighth note the soprano,
alto, tenor and bass in turn, each a pitch that is struck or held, and a bar line between bars; all are transposed to no
sharps or flats. An LSTM tells the next token from all before it and writes with rnnkern.generate. On chorales whose
melody it was not trained on it is compared with counting: the odds of a token after the last n of them, voice and beat
known, for the best n (interpolated Witten-Bell smoothing). The picture is what it wrote, as a piano roll; a MIDI file
of it lies beside the picture.

    pip install -c constraints.txt -e '.[examples]' && python examples/chorales.py

Bits per eighth note of four voices: 6.90; counting, 4 tokens back: 10.22. 306 chorales trained on, 31 of the test. 90 s
of one core.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from common import BLUE, GREEN, GREY, ORANGE, figure, options, pad, save, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnkern

VOICES = ("soprano", "alto", "tenor", "bass")
LOW, HIGH = 28, 88  # MIDI numbers of the pitches that there are tokens for, REST is one below
REST, COUNT = LOW - 1, 2 * (HIGH - LOW + 2)
BAR, BEGIN, END, TOKENS = COUNT, COUNT + 1, COUNT + 2, COUNT + 3
HIDDEN, BATCH, LENGTH, ORDERS = 256, 32, 128, 10
SEMITONE = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
FILES = "bwv*.mxl"
GRID = Fraction(1, 2)  # of a quarter note


class Chorale(NamedTuple):
    name: str
    voices: list[list[tuple[int, bool]]]  # four times [steps]: pitch, and whether it is struck here
    bars: frozenset[int]  # steps with which a bar begins


def struck(part: ElementTree.Element) -> tuple[list[tuple[Fraction, Fraction, int]], list[Fraction]]:
    """Notes of one part as begin, end and pitch, in quarter notes and semitones; and where its bars begin."""
    now, divisions = Fraction(0), 1
    notes: list[tuple[Fraction, Fraction, int]] = []
    bars = []
    for bar in part.iter("measure"):
        bars.append(now)
        divisions = int(bar.findtext("attributes/divisions") or divisions)
        for note in bar.iter("note"):
            if note.find("chord") is not None or note.find("grace") is not None:
                continue  # a voice is one note at a time: of a chord the first
            end, pitch = now + Fraction(int(note.findtext("duration") or 0), divisions), REST
            if note.find("pitch") is not None:
                step, octave = note.findtext("pitch/step"), int(note.findtext("pitch/octave") or 0)
                pitch = SEMITONE[step or "C"] + int(note.findtext("pitch/alter") or 0) + 12 * (octave + 1)
            held = any(tie.get("type") == "stop" for tie in note.iter("tie"))
            if held and notes and notes[-1][2] == pitch:
                notes[-1] = (notes[-1][0], end, pitch)
            else:
                notes.append((now, end, pitch))
            now = end
    return notes, bars


def read(path: Path) -> Chorale | None:
    """A score in MusicXML, or None where it is not four single voices or leaves the range of the tokens."""
    with zipfile.ZipFile(path) as file:
        name = next(
            name for name in file.namelist() if name.endswith("xml") and not name.startswith(("META-INF", "__"))
        )
        score = ElementTree.fromstring(file.read(name))
    parts = score.findall("part")
    if len(parts) != len(VOICES) or score.find(".//backup") is not None:
        return None
    down = 7 * int(score.findtext(".//key/fifths") or 0) % 12  # from the key to C major or A minor
    down = down - 12 if down > 6 else down
    voices, length = [], 0
    for part in parts:
        notes, bars = struck(part)
        length = max(length, math.ceil(notes[-1][1] / GRID))
        line = [(REST, False)] * length
        for begin, end, pitch in notes:
            pitch -= down if pitch != REST else 0
            if not REST <= pitch <= HIGH:
                return None
            first = math.ceil(begin / GRID)
            for at in range(first, math.ceil(end / GRID)):
                line[at] = (pitch, at == first)
        voices.append(line)
    if len({len(line) for line in voices}) != 1:
        return None
    return Chorale(path.stem, voices, frozenset(int(bar / GRID) for bar in bars))


def chorales() -> list[Chorale]:
    spec = importlib.util.find_spec("music21")  # its files are read, it is not imported: that alone takes seconds
    assert spec is not None and spec.submodule_search_locations, "music21 is not installed"
    folder = Path(spec.submodule_search_locations[0]) / "corpus" / "bach"
    found = (read(path) for path in sorted(folder.glob(FILES)))
    return [chorale for chorale in found if chorale]


def phrases(chorale: Chorale) -> set[tuple[int, ...]]:
    """What its melody consists of: all that the soprano does in eight intervals, repeated notes left out."""
    pitches = [pitch for pitch, onset in chorale.voices[0] if onset and pitch != REST]
    intervals = [b - a for a, b in pairwise(pitches) if a != b]
    return {tuple(intervals[i : i + 8]) for i in range(len(intervals) - 7)}


def split(found: list[Chorale]) -> tuple[list[Chorale], list[Chorale]]:
    """Of training and of the test, a twelfth of all. Bach set many melodies more than once: nothing is trained on that
    shares a quarter of its melody with a chorale of the test."""
    test = [chorale for chorale in found if zlib.crc32(chorale.name.encode()) % 12 == 0]
    known = [phrases(chorale) for chorale in test]
    train = []
    for chorale in found:
        own = phrases(chorale)
        if not any(len(own & other) * 4 >= min(len(own), len(other)) for other in known):
            train.append(chorale)
    return train, test


def tokens_of(chorale: Chorale) -> list[int]:
    tokens = [BEGIN]
    for at, voices in enumerate(zip(*chorale.voices, strict=True)):
        if at in chorale.bars:
            tokens.append(BAR)
        tokens += [2 * (pitch - REST) + onset for pitch, onset in voices]
    return [*tokens, END]


def chorale_of(tokens: list[int], name: str) -> Chorale:
    """The way back; whatever does not fill all four voices is left out."""
    notes: list[tuple[int, bool]] = []
    bars = set()
    for token in tokens:
        if token == BAR:
            bars.add(len(notes) // 4)
        elif token < COUNT:
            notes.append((token // 2 + REST, bool(token % 2)))
    return Chorale(name, [notes[voice : len(notes) // 4 * 4 : 4] for voice in range(4)], frozenset(bars))


def sounding(line: list[tuple[int, bool]]) -> list[tuple[int, int, int]]:
    """Begin, steps and pitch of a voice's notes."""
    notes: list[tuple[int, int, int]] = []
    for at, (pitch, onset) in enumerate(line):
        if pitch == REST:
            continue
        begin, steps, before = notes[-1] if notes else (0, 0, REST)
        if onset or pitch != before or begin + steps != at:
            notes.append((at, 1, pitch))
        else:
            notes[-1] = (begin, steps + 1, pitch)
    return notes


class Composer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 64)
        self.rnn = rnnkern.LSTM(64, hidden)
        self.head = nn.Linear(hidden, TOKENS)
        self.dropout = nn.Dropout(0.4)

    def forward(self, tokens: Tensor) -> Tensor:  # [T, N] -> logits of the next [T, N, TOKENS]
        return self.head(self.dropout(self.rnn(self.dropout(self.embedding(tokens)))[0]))


def places(tokens: list[int]) -> list[int]:
    """Of every token which voice is due, as if each were a note, and whether it is on the beat or between two."""
    notes, found = 0, []
    for token in tokens:
        found.append(notes % 8)
        notes = notes + 1 if token < COUNT else 0 if token == BAR else notes
    return found


def counted(train: list[list[int]], test: list[list[int]], orders: int) -> list[float]:
    """Bits of all of the test's tokens after 0, 1, ... of those before, by counts (Witten and Bell 1991)."""
    after: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(orders)]

    def contexts(tokens: list[int]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
        due = places(tokens)
        for i in range(1, len(tokens)):
            yield tokens[i], [(due[i], *tokens[i - n : i]) for n in range(min(orders, i + 1))]

    for tokens in train:
        for token, known in contexts(tokens):
            for n, context in enumerate(known):
                after[n][context][token] += 1
    bits = [0.0] * orders
    for tokens in test:
        for token, known in contexts(tokens):
            p = 1 / TOKENS
            for n in range(orders):  # the shorter context's odds fill what the longer one has not seen
                seen = after[n].get(known[n]) if n < len(known) else None
                if seen:
                    p = (seen[token] + len(seen) * p) / (seen.total() + len(seen))
                bits[n] -= math.log2(p)
    return bits


def midi(chorale: Chorale) -> bytes:
    """A Standard MIDI File: a track for every voice, 480 ticks to the quarter."""
    step = int(480 * GRID)

    def later(ticks: int) -> bytes:
        out = [ticks & 127]
        while ticks := ticks >> 7:
            out.insert(0, ticks & 127 | 128)
        return bytes(out)

    tracks = []
    for voice, line in enumerate(chorale.voices):
        # Of what happens at one moment, a note's end comes first.
        events = [(begin * step, 1, pitch) for begin, _, pitch in sounding(line)]
        events += [((begin + steps) * step, 0, pitch) for begin, steps, pitch in sounding(line)]
        body, now = b"", 0
        for at, on, pitch in sorted(events):
            body += later(at - now) + bytes([(0x90 if on else 0x80) + voice, pitch, 80])
            now = at
        body += b"\x00\xff\x2f\x00"
        tracks.append(b"MTrk" + len(body).to_bytes(4, "big") + body)
    return b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), 480) + b"".join(tracks)


def draw(chorale: Chorale, out: Path) -> None:
    picture, axes = figure(11, 4)
    for name, line, color in zip(VOICES, chorale.voices, (ORANGE, GREEN, BLUE, GREY), strict=True):
        notes = sounding(line)
        axes.barh(
            [pitch for *_, pitch in notes], [steps - 0.15 for _, steps, _ in notes], 0.8,
            [begin for begin, *_ in notes], color=color, label=name,
        )  # fmt: skip
    for bar in chorale.bars:
        axes.axvline(bar - 0.07, color="#dddddd", linewidth=0.8, zorder=0)
    pitches = [pitch for line in chorale.voices for pitch, _ in line if pitch != REST] or [60]
    named = [pitch for pitch in range(min(pitches), max(pitches) + 1) if pitch % 12 in (0, 4, 7)]
    axes.set_yticks(named, [f"{'C   E  G'[pitch % 12]}{pitch // 12 - 1}" for pitch in named])
    axes.set_xticks(sorted(chorale.bars), range(1, len(chorale.bars) + 1))
    axes.set(xlabel="bar", xlim=(-0.5, len(chorale.voices[0]) + 0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False, fontsize=9)
    save(picture, out)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=400, out="chorales.png")
    train_set, test_set = split(chorales())
    lines, test = [[tokens_of(chorale) for chorale in part] for part in (train_set, test_set)]
    stream = torch.tensor([token for line in lines for token in line])
    model = Composer(HIDDEN)

    def loss() -> Tensor:
        rows = torch.randint(len(stream) - LENGTH, (BATCH,)) + torch.arange(LENGTH + 1)[:, None]
        crops = stream[rows]
        return cross_entropy(model(crops[:-1]).flatten(0, 1), crops[1:].flatten())

    train(model, loss, args.steps, 5e-3)
    model.eval()
    tokens, lengths = pad(test)
    told = torch.arange(1, len(tokens))[:, None] < lengths
    with torch.no_grad():
        nats = cross_entropy(model(tokens[:-1])[told], tokens[1:][told], reduction="sum").item()
    eighths = sum(len(chorale.voices[0]) for chorale in test_set)
    bits = nats / math.log(2) / eighths
    by_order = counted(lines, test, ORDERS)
    best = min(range(ORDERS), key=by_order.__getitem__)
    counting = by_order[best] / eighths
    print(
        f"bits per eighth note of four voices: {bits:.2f}; counting, {best} tokens back: {counting:.2f} "
        f"({len(lines)} chorales trained on, {len(test)} of the test)"
    )
    written = rnnkern.generate(
        (model.embedding, model.rnn, model.head), torch.tensor([BEGIN]), 700, do_sample=True, temperature=0.9,
        top_p=0.9, eos_token_id=END, generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    chorale = chorale_of(written.tokens.tolist(), "written")
    draw(chorale, args.out)
    args.out.with_suffix(".mid").write_bytes(midi(chorale))
    print(f"to hear: {args.out.with_suffix('.mid')}")
    return {"lstm": bits, "counting": counting}


if __name__ == "__main__":
    main()
