"""A decoder's attention in the native loop of :func:`rnnkern.generate`: what it takes, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern.seq2seq import Attention, Decoder, DecoderState

STEPS = ("step", "_step", "_scan", "_read")  # of a decoder, which a patch may have replaced


@dataclass(frozen=True)
class Attended:
    """The attention of a decoder over the source that a state has."""

    decoder: Decoder
    attention: Attention
    state: DecoderState
    lengths: Tensor

    @classmethod
    def of(cls, decoder: Decoder, state: DecoderState, N: int) -> Attended | str | None:
        """The reason where there is none; None where the decoder says what is wrong."""
        attention, source = decoder.attention, state.source
        if type(decoder) is not Decoder or any(name in decoder.__dict__ for name in STEPS):
            return f"the {type(decoder).__name__} has a step of its own"
        assert attention is not None
        linears = [decoder.readout]
        if attention.kind == "additive":
            linears += [attention.query, attention.score]
        for part, kind in ((attention, Attention), *((linear, nn.Linear) for linear in linears)):
            if reason := not_plain(part, (kind,)):
                return reason
        if any(linear.bias is not None for linear in linears):
            return "attention or its readout has a bias"
        if source is None or state.hx is None:
            return None
        (values, keys, padding), L = source, source.values.shape[1]
        S, P, V = attention.source_size, attention.query_size, decoder.embedding.num_embeddings
        A = attention.query.out_features if attention.kind == "additive" else P
        found = [values.shape, keys.shape, decoder.readout.weight.shape, decoder.head.weight.shape]
        fed = decoder.rnn.input_size - decoder.embedding.embedding_dim
        if found != [(N, L, S), (N, L, A), (P, S + P), (V, P)] or fed != (0, S, P)[_fed(decoder)]:
            return None
        if not L:
            return "the source has no steps"
        lengths = torch.full((N,), L)
        if padding is not None:
            if padding.shape != (N, L) or padding.device.type != "cpu":
                return None
            lengths = (~padding).sum(1)
            if not torch.equal(padding, torch.arange(L) >= lengths[:, None]):
                return "the source's padding is not behind its rows"
        if decoder.input_feeding and (state.readout is None or state.readout.shape != (N, P)):
            return None
        return cls(decoder, attention, state, lengths)

    @property
    def width(self) -> int:
        """Features that the network reads behind its token's."""
        return self.decoder.rnn.input_size - self.decoder.embedding.embedding_dim

    def tensors(self) -> list[Tensor]:
        """All that must be of one dtype and on one device."""
        assert self.state.source is not None
        found = [self.decoder.readout.weight, self.state.source.values, self.state.source.keys]
        if self.attention.kind == "additive":
            found += [self.attention.query.weight, self.attention.score.weight]
        return found if self.state.readout is None else [*found, self.state.readout]

    def arguments(self, kept: torch.dtype, wide: torch.dtype, beams: int) -> tuple[Any, ...]:
        """As csrc/stream.cpp takes them: matrices in `kept`, all else and an additive one's keys in `wide`."""
        assert self.state.source is not None
        values, keys, _ = self.state.source
        additive = self.attention.kind == "additive"
        query = score = before = None
        if additive:
            query = self.attention.query.weight.detach().to(kept).contiguous()
            score = self.attention.score.weight.detach().to(wide).flatten().contiguous()
        if self.decoder.input_feeding:
            assert self.state.readout is not None
            before = self.state.readout.detach().repeat_interleave(beams, 0).contiguous()
        return (
            additive, _fed(self.decoder),
            keys.detach().to(wide if additive else kept).contiguous(),
            values.detach().transpose(1, 2).to(kept).contiguous(),
            self.lengths, query, score,
            self.decoder.readout.weight.detach().to(kept).contiguous(),
            before,
        )  # fmt: skip


def _fed(decoder: Decoder) -> int:
    """What a step reads behind the token, as csrc/api.h numbers it: nothing, the context, or the readout before."""
    return 1 if decoder.form == "bahdanau" else 2 if decoder.input_feeding else 0


def not_plain(part: Any, kinds: tuple[type, ...]) -> str | None:
    """Why a module may compute something else than its class does."""
    name = type(part).__name__
    if type(part) not in kinds:
        return f"{name} is not {' or '.join(kind.__name__ for kind in kinds)}"
    if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        return f"the {name} has hooks or a forward of its own"
    return None
