"""The loop of :func:`rnnkern.generate` in native code: which models it takes, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rnnkern import _fast, _stream, dispatch
from rnnkern._generate_attention import Attended, not_plain
from rnnkern._generate_model import Network, Options, Steps, Written, refusal
from rnnkern._options import PLAIN
from rnnkern.backends.base import accumulation_dtype

TABLE = 64 << 20  # bytes of the first layer's products with every token, beyond which they are made step by step
FEW = 8  # rows that a step multiplies in the time that it takes to read the weights
KEPT = 64 << 20  # bytes of weights beyond which they are packed anew by every call


class Packed(NamedTuple):
    """The extension's stream with a head, the weights that it has packed, and what it reads for each token.

    That is the token's embedding; or, where that is less work, the embedding's product with the first layer's weights,
    made for all tokens at once.
    """

    engine: Any
    table: Tensor
    as_gates: bool
    made_for: tuple[Any, ...]
    weights: list[Tensor | None]  # copies, because weights can change in ways that leave no trace

    def serves(self, made_for: tuple[Any, ...], as_gates: bool, weights: Sequence[Tensor | None]) -> bool:
        return self.made_for == made_for and self.as_gates >= as_gates and all(map(_same, self.weights, weights))


# The last call's of each network: packing takes longer than some tens of steps. A call takes it away while it runs.
_LAST: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """A call that runs in native code."""

    network: Network | Written
    attended: Attended | None
    shape: _stream.Shape
    dtype: torch.dtype
    states: tuple[Tensor, ...]
    options: Options

    @classmethod
    def of(cls, steps: Steps, prompt: Tensor, state: Any, options: Options) -> Plan | str | None:
        """The reason where there is none; None where another backend was asked for, or there is nothing to do."""
        if dispatch.requested() not in (None, "cpp") or not len(prompt):
            return None
        if not isinstance(steps, (Network, Written)):
            return "the model is not an embedding, a recurrent network and a head, or a Decoder"
        rnn, head = steps.rnn, steps.head
        for part, kinds in ((steps.embedding, (nn.Embedding, nn.Linear)), (head, (nn.Linear,))):
            if part is not None and (reason := not_plain(part, kinds)):
                return reason
        if getattr(steps.embedding, "max_norm", None) is not None:
            return "the embedding has max_norm"
        try:
            shape = _stream.Shape.of(rnn)
        except (TypeError, ValueError) as error:
            return str(error).removeprefix("Stream: ")
        if shape.options != PLAIN:
            return f"the network has {shape.options.scanned(training=False)}"
        if rnn.training and _drops(rnn):
            return "the network is in training mode, with dropout: call its eval() first"
        if rnn.training and getattr(rnn, "batch_norm", False):
            return "the network is in training mode, with batch norm: call its eval() first"
        weights = [*rnn.parameters(), *head.parameters(), *(steps.embedding.parameters() if steps.embedding else ())]
        dtype = weights[0].dtype
        if any(w.device.type != "cpu" for w in (*weights, prompt)):
            return "there is no native loop for other devices than the CPU"
        if dtype not in dispatch.DTYPES or any(w.dtype != dtype for w in weights):
            return "expected weights of one dtype, float64, float32, bfloat16 or float16"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if not _fast.available():
            return dispatch.unavailable("cpp") or "this torch's tensors are not known to the extension"
        attended = None
        if isinstance(steps, Written):
            found = Attended.of(steps.decoder, state, len(prompt))
            if not isinstance(found, Attended):
                return found
            attended, state = found, state.hx
            if any(t.dtype != dtype or t.device.type != "cpu" for t in attended.tensors()):
                return None  # the decoder says what is wrong with it
        states = () if state is None else state if isinstance(state, tuple) else (state,)
        if not all(isinstance(s, Tensor) and s.dtype == dtype and s.device.type == "cpu" for s in states) or (
            state is not None and tuple(tuple(s.shape) for s in states) != shape.sizes(len(prompt))
        ):
            return None  # the network says what is wrong with it
        return cls(steps, attended, shape, dtype, states, options)

    def run(self, prompt: Tensor, lengths: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        o, N = self.options, len(prompt)
        packed = self._packed(prompt.shape[1] + o.most, N * o.beams)
        engine = packed.engine
        if self.states:
            engine.write(None, *(s.detach().repeat_interleave(o.beams, 1).contiguous() for s in self.states))
        tokens, counts = torch.full((N, o.most), o.pad), torch.empty(N, dtype=torch.int64)
        scores = torch.empty(N, dtype=torch.float64) if o.beams > 1 else None
        stops = torch.tensor(o.stops) if o.stops else None
        top_k = 0 if o.top_k is None or o.top_k >= self.network.head.out_features else o.top_k
        wide = accumulation_dtype(self.dtype)
        attention = self.attended and self.attended.arguments(_kept(self.dtype), wide, o.beams)
        found = engine.generate(
            prompt.contiguous(), lengths.contiguous(), packed.table, uniform, stops, tokens, counts, scores,
            o.beams, o.temperature, top_k, o.top_p, o.penalty, attention,
        )  # fmt: skip
        if found is None:
            raise TypeError("generate: tensors without numbers to read (of a transform or a trace?)")
        row, step, peak = found
        if row >= 0:
            raise RuntimeError(refusal(row, step, peak))
        if sum(w.nbytes for w in packed.weights if w is not None) <= KEPT:
            _LAST[self.network.rnn] = packed
        return tokens, counts, scores

    def _packed(self, steps: int, rows: int) -> Packed:
        from rnnkern import _cpu
        from rnnkern.backends import cpp

        s, network, wide = self.shape, self.network, accumulation_dtype(self.dtype)
        flat = _stream.snapshot(network.rnn, s, self.dtype, None, copy=False)
        w_ih, embedding, head = flat[0], _embedded(network.embedding), network.head
        assert w_ih is not None
        tokens = network.reads or 0
        bytes_of_gates = tokens * w_ih.shape[0] * torch.finfo(wide).bits // 8
        as_gates = embedding is None or (tokens <= steps * max(rows, FEW) and bytes_of_gates <= TABLE)
        fed = self.attended.width if self.attended else 0
        bias = None if head.bias is None else head.bias.detach()
        weights = [*flat, embedding, head.weight.detach(), bias]
        made_for = (cpp.BACKEND.isa, s, self.dtype, rows, fed)
        last = _LAST.pop(network.rnn, None)
        if last is not None and last.serves(made_for, as_gates, weights):
            last.engine.write(None)
            return last

        copies = [None if w is None else w.clone() for w in weights]
        table: Any
        if embedding is None:
            table = w_ih.to(wide).t()
        elif as_gates:
            table = embedding.to(wide) @ w_ih[:, : s.I - fed].to(wide).t()
            flat[0] = w_ih[:, s.I - fed :].contiguous()
        else:
            table = copies[len(flat)]
        form = _stream.FORMS["bf16" if self.dtype == torch.bfloat16 else None]
        cell, dtype = cpp.CELL_NUMBERS[s.cell], cpp.DTYPE_NUMBERS[self.dtype]
        sizes = s.native(rows, fed if as_gates else s.I)
        engine = _cpu.Stream(cpp.BACKEND.isa, cell, dtype, form, *sizes, head.out_features)
        bias = None if bias is None else bias.to(wide).contiguous()
        if not engine.pack(*flat, head.weight.detach().to(_kept(self.dtype)).contiguous(), bias, None):
            raise TypeError("generate: weights without numbers to read (of a transform or a trace?)")
        return Packed(engine, table.contiguous(), as_gates, made_for, copies)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """To the bit, NaN too."""
    if a is None or b is None:
        return a is b
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def _drops(rnn: nn.RNNBase) -> bool:
    options: Any = getattr(rnn, "options", PLAIN)
    return bool((rnn.dropout and rnn.num_layers > 1) or options.recurrent_dropout or options.weight_dropout)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What matrices are given in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else accumulation_dtype(dtype)


def _embedded(embedding: Any) -> Tensor | None:
    """What the embedding makes of every token, `(V, I)`."""
    if embedding is None:
        return None
    weight = embedding.weight.detach()
    if isinstance(embedding, nn.Embedding):
        return weight
    return weight.t() if embedding.bias is None else weight.t() + embedding.bias.detach()
