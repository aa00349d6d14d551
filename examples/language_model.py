"""Many to many, and one to many: a character language model on English text, and what it writes.

The text is the language reference that Python carries for its own help(). The model is compared, on the part of the
text that it never saw, with counting: the character's odds after the last n characters, for the best n (interpolated
Witten-Bell smoothing), and with the compressor xz, which sees all that comes before. The picture shows the units of the
LSTM over a line of text.

    pip install -c constraints.txt -e '.[examples]' && python examples/language_model.py

Bits per character: 1.68; counting four characters back: 1.82; xz: 1.74. 47 s of one core.
"""

from __future__ import annotations

import lzma
import math
import re
from collections import Counter, defaultdict

import torch
from common import options, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnkern
from rnnkern.demo import CharacterModel, Text, held_out_loss, read_text
from rnnkern.diagnostics import StateMap, state_map

HIDDEN, BATCH, LENGTH, ORDERS = 256, 32, 64, 6


def distinct(text: Text) -> Text:
    """The text with every paragraph once: help() repeats whole pages."""
    whole = text.decode(torch.cat([text.train, text.held]).tolist())
    kept = "\n\n".join({" ".join(part.split()): part for part in re.split(r"\n\s*\n", whole)}.values())
    alphabet = "".join(sorted(set(kept)))
    data = torch.tensor([alphabet.index(character) for character in kept])
    held = len(data) // 20
    return Text(text.name, alphabet, data[:-held], data[-held:])


def counted(text: Text, orders: int) -> float:
    """Bits per character of the held-out text by counts of the training text (Witten and Bell 1991)."""
    characters = len(text.alphabet)
    train, held = text.train.tolist(), text.held.tolist()
    after: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(orders)]
    for n in range(orders):
        for i in range(n, len(train)):
            after[n][tuple(train[i - n : i])][train[i]] += 1
    bits = 0.0
    for i in range(orders, len(held)):
        p = 1 / characters
        for n in range(orders):  # the shorter context's odds fill what the longer one has not seen
            seen = after[n].get(tuple(held[i - n : i]))
            if seen:
                p = (seen[held[i]] + len(seen) * p) / (seen.total() + len(seen))
        bits -= math.log2(p)
    return bits / (len(held) - orders)


def compressed(text: Text) -> float:
    """Bits per character that the held-out text adds to what xz makes of the text before it."""
    before, whole = (text.decode(part.tolist()).encode() for part in (text.train, torch.cat([text.train, text.held])))
    return 8 * (len(lzma.compress(whole, preset=9)) - len(lzma.compress(before, preset=9))) / len(text.held)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=1000, out="language_model.png")
    text = distinct(read_text(None, LENGTH, torch.device("cpu")))
    model = CharacterModel(rnnkern.LSTM(64, HIDDEN), len(text.alphabet))
    model.embedding = nn.Embedding(len(text.alphabet), 64)
    crops = text.batches(args.steps, BATCH, LENGTH, args.seed)

    def loss() -> Tensor:
        x, target = next(crops)
        return cross_entropy(model(x)[0].flatten(0, 1), target.flatten())

    train(model, loss, args.steps, 5e-3)
    bits = held_out_loss(model, text.held, BATCH, LENGTH) / math.log(2)
    by_order = {n: counted(text, n) for n in range(1, ORDERS + 1)}
    best = min(by_order, key=by_order.__getitem__)
    xz = compressed(text)
    print(f"bits per character: {bits:.2f}; counting, {best - 1} characters back: {by_order[best]:.2f}; xz: {xz:.2f}")
    written = rnnkern.generate(
        (model.embedding, model.rnn, model.head), text.prompt(), 300, do_sample=True, temperature=0.7,
        generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    sample = text.decode(written.tokens.tolist())
    print(f"\nwhat it writes after {text.decode(text.prompt().tolist())!r}:\n\n{sample}\n")

    part = text.held[2000:2080]
    some = {"48 of the LSTM's units": state_map(model, part[:, None]).layers["rnn"][:, :48]}
    StateMap(some).draw(args.out, labels=text.decode(part.tolist()).replace("\n", "/"))
    print(f"picture: {args.out}")
    return {"lstm": bits, "counting": by_order[best], "xz": xz}


if __name__ == "__main__":
    main()
