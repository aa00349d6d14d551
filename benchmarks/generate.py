"""Tokens written one after the other: ``python -m benchmarks.generate``.

rnnkern.generate beside loops as they are usually written over torch.nn: an embedding, one step of the network as a cell
and as a layer with T=1, a linear head, and the choice. For beam search, which nobody writes in a few lines, the peer is
generate's own loop in Python over torch.nn. With attention the model is a Decoder over a source of 32 steps, and
the loops have attention in torch operations. Interleaved rounds in one process on one thread. The first call is not
timed: in it generate packs the weights, in the others it compares them with what it has packed. What is greedy is
checked first, token for token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rnnkern
from benchmarks import machine
from benchmarks.results import RESULTS, append, constants

COLUMNS = (
    "date, commit, machine, cpu, torch, threads, cell, B, H, V, tokens, choice, side, rounds, us_per_step, ratio, "
    "ratio_p20, ratio_p80"
).split(", ")
H, V, TOKENS, ROUNDS, SOURCE = 256, 1000, 128, 15, 32
PEER = "torch.nn cell loop"
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top_k=50": {"do_sample": True, "top_k": 50},
    "top_p=0.9": {"do_sample": True, "top_p": 0.9},
    "num_beams=4": {"num_beams": 4},
}

# Greedy, by a decoder of these arguments.
DECODERS: dict[str, dict[str, Any]] = {
    "attention=dot": {"attention": "dot"},
    "attention=dot input_feeding": {"attention": "dot", "input_feeding": True},
    "attention=additive bahdanau": {"attention": "additive", "form": "bahdanau"},
}

Call = Callable[[], Tensor]


def chosen(logits: Tensor, do_sample: bool = False, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """A choice of the next token, in the usual lines."""
    if not do_sample:
        return logits.argmax(-1)
    if top_k is not None:
        values, indices = logits.topk(top_k)
        return indices.gather(-1, torch.multinomial(values.softmax(-1), 1)).squeeze(-1)
    odds = logits.softmax(-1)
    if top_p < 1:
        odds, indices = odds.sort(descending=True)
        odds = odds * (odds.cumsum(-1) - odds < top_p)
        return indices.gather(-1, torch.multinomial(odds, 1)).squeeze(-1)
    return torch.multinomial(odds, 1).squeeze(-1)


def loops(
    embedding: nn.Embedding, rnn: Any, head: nn.Linear, prompt: Tensor, count: int, options: dict[str, Any]
) -> Iterator[tuple[str, Call]]:
    cell = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}[type(rnn)](H, H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in rnn.state_dict().items()})

    def by_cell() -> Tensor:
        token, state, tokens = prompt[:, 0], None, []
        for _ in range(count):
            state = cell(embedding(token), state)
            token = chosen(head(state[0] if isinstance(state, tuple) else state), **options)
            tokens.append(token)
        return torch.stack(tokens, 1)

    def by_layer() -> Tensor:
        token, state, tokens = prompt[:, 0], None, []
        for _ in range(count):
            y, state = rnn(embedding(token)[None], state)
            token = chosen(head(y[0]), **options)
            tokens.append(token)
        return torch.stack(tokens, 1)

    yield PEER, by_cell
    yield "torch.nn layer loop", by_layer


def decoder_loops(decoder: Any, start: Any, prompt: Tensor, count: int) -> Iterator[tuple[str, Call]]:
    rnn, attention, (values, keys, _) = decoder.rnn, decoder.attention, start.source
    cells, layers = {"LSTM": (nn.LSTMCell, nn.LSTM), "GRU": (nn.GRUCell, nn.GRU)}[rnn.mode]
    cell, layer = cells(rnn.input_size, H), layers(rnn.input_size, H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in rnn.state_dict().items()})
    layer.load_state_dict(rnn.state_dict())

    def context_of(query: Tensor) -> Tensor:
        if attention.kind == "additive":
            scores = attention.score(torch.tanh(attention.query(query)[:, None] + keys)).squeeze(-1)
        else:
            scores = torch.bmm(keys, query[:, :, None]).squeeze(-1)
        return torch.bmm(scores.softmax(-1)[:, None], values).squeeze(1)

    def loop(step: Callable[[Tensor, Any], tuple[Tensor, Any]], state: Any) -> Tensor:
        token, tokens, readout = prompt[:, 0], [], start.readout
        h = state[0] if isinstance(state, tuple) else state
        for _ in range(count):
            x = decoder.embedding(token)
            if decoder.form == "bahdanau":
                context = context_of(h.reshape(-1, H))
                h, state = step(torch.cat([x, context], -1), state)
            else:
                h, state = step(torch.cat([x, readout], -1) if decoder.input_feeding else x, state)
                context = context_of(h)
            readout = torch.tanh(decoder.readout(torch.cat([context, h], -1)))
            token = decoder.head(readout).argmax(-1)
            tokens.append(token)
        return torch.stack(tokens, 1)

    def by_cell(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = cell(x, state)
        return (state[0] if isinstance(state, tuple) else state), state

    def by_layer(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = layer(x[None], state)
        return y[0], state

    flat = tuple(s[0] for s in start.hx) if isinstance(start.hx, tuple) else start.hx[0]
    yield PEER, lambda: loop(by_cell, flat)
    yield "torch.nn layer loop", lambda: loop(by_layer, start.hx)


def sides(kind: str, B: int, count: int, choice: str) -> dict[str, Call]:
    torch.manual_seed(0)
    prompt, state, options = torch.randint(V, (B, 1)), None, CHOICES.get(choice, {})
    found: dict[str, Call] = {}
    model: Any
    if choice in DECODERS:
        model = rnnkern.seq2seq.Decoder(V, H, H, cell=kind.upper(), source_size=H, **DECODERS[choice])
        state = model.start(source=torch.randn(SOURCE, B, H))
        found |= decoder_loops(model, state, prompt, count)
    else:
        rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](H, H)
        model = nn.Embedding(V, H), rnn, nn.Linear(H, V)
        if "num_beams" not in options:
            found |= loops(*model, prompt, count, options)

    def ours() -> Tensor:
        out = rnnkern.generate(model, prompt, count, state=state, **options)
        assert out.backend == "cpp"
        return out.tokens

    def in_python() -> Tensor:
        with rnnkern.use_backend("torch"):
            return rnnkern.generate(model, prompt, count, state=state, **options).tokens

    found |= {"generate": ours, "generate in Python": in_python}
    if "do_sample" not in options:
        truth = in_python()
        for name, call in found.items():
            same = (call() == truth).all(1).float().mean().item()
            if same < 0.95:  # a row may part where two logits are equal but for rounding
                raise RuntimeError(f"{name}: only {same:.0%} of the rows are what generate in Python gives")
    return found


def measured(kind: str, B: int, choice: str, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The ratio is that of the peer's time to the side's in the same round."""
    entries = sides(kind, B, count, choice)
    peer = PEER if PEER in entries else "generate in Python"
    taken: dict[str, list[float]] = {name: [] for name in entries}
    for r in range(rounds + 1):
        for name, call in entries.items():
            start = time.perf_counter()
            call()
            if r:  # the first is not counted
                taken[name].append((time.perf_counter() - start) / count * 1e6)
    for name in entries:
        ratios = [a / b for a, b in zip(taken[peer], taken[name], strict=True)]
        p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
        yield {
            **{"cell": kind, "B": B, "H": H, "V": V, "tokens": count, "choice": choice, "side": name},
            **{"rounds": rounds, "us_per_step": f"{statistics.median(taken[name]):.4g}"},
            **{"ratio": f"{statistics.median(ratios):.4g}", "ratio_p20": f"{p20:.4g}", "ratio_p80": f"{p80:.4g}"},
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--cell", nargs="*", default=["lstm", "gru"])
    parser.add_argument("--choice", nargs="*", default=[*CHOICES, *DECODERS])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="appended to; default: benchmarks/results/generate/<machine>.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or RESULTS / "generate" / f"{machine.machine()}.csv"
    shared = {name: value for name, value in constants(1).items() if name in COLUMNS}
    with torch.inference_mode():
        for kind in args.cell:
            for B in args.batch:
                for choice in args.choice:
                    for row in measured(kind, B, choice, args.tokens, args.rounds):
                        append(out, shared | row, COLUMNS)
                        print(", ".join(f"{value}" for value in row.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
