"""Encoder, bridge and decoder as one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnkern._call import Lengths
from rnnkern.seq2seq._decoder import Decoder, DecoderState
from rnnkern.seq2seq._encoder import Encoder


class Bridge(nn.Module):
    r"""A decoder's initial states from an encoder's last ones, layer by layer.

    .. math::
        h_0^{dec} = \tanh(W_h [\overrightarrow h; \overleftarrow h] + b_h), \quad
        c_0^{dec} = W_c [\overrightarrow c; \overleftarrow c] + b_c

    after Bahdanau et al. 2015 (A.2.2), who take the backward state alone. Where encoder and decoder have the same cell
    and sizes and one direction, states are handed over as they are, and there are no parameters. An LSTM that follows
    another cell gets its `c` from `h`; the `c` of one that precedes it is left behind.

    Args:
        encoder: whose states come in.
        decoder: whose states go out; with as many layers.

    Inputs: hx
        * **hx**: as the encoder returns it.

    Outputs: hx
        * **hx**: as the decoder takes it.

    Raises:
        ValueError: another number of layers in the decoder than in the encoder.

    Example::

        >>> bridge = rnnkern.seq2seq.Bridge(encoder, decoder)
        >>> output, hx = encoder(source, lengths)
        >>> state = decoder.start(bridge(hx), output, lengths)
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        ours, theirs = encoder.rnn, decoder.rnn
        if ours.num_layers != theirs.num_layers:
            raise ValueError(
                f"Bridge: expected as many layers in the decoder as in the encoder, {ours.num_layers}, "
                f"got {theirs.num_layers}"
            )
        self.directions = 1 + ours.bidirectional
        given, wanted = _widths(ours), _widths(theirs)
        self.maps: nn.ModuleList | None = None
        if ours.bidirectional or given != wanted:
            like: dict[str, Any] = {"device": ours.weight_hh_l0.device, "dtype": ours.weight_hh_l0.dtype}
            entering = [given[min(k, len(given) - 1)] for k in range(len(wanted))]
            pairs = zip(entering, wanted, strict=True)
            self.maps = nn.ModuleList(nn.Linear(self.directions * i, o, **like) for i, o in pairs)

    def forward(self, hx: Any) -> Any:
        if self.maps is None:
            return hx
        states = hx if isinstance(hx, tuple) else (hx,)
        found = []
        for k, map in enumerate(self.maps):
            h = states[min(k, len(states) - 1)]
            layers = h.unflatten(0, (-1, self.directions)).transpose(1, 2).flatten(2)  # [layers, N, D * H]
            found.append(map(layers) if k else torch.tanh(map(layers)))  # c, unlike h, has no bounds
        return found[0] if len(found) == 1 else tuple(found)


def _widths(rnn: nn.RNNBase) -> tuple[int, ...]:
    h = rnn.proj_size or rnn.hidden_size
    return (h, rnn.hidden_size) if isinstance(rnn, nn.LSTM) else (h,)


class Seq2Seq(nn.Module):
    """Sequence to sequence (Sutskever et al. 2014, Cho et al. 2014): a source in, the logits of a target out.

    Args:
        encoder: reads the source.
        decoder: writes the target.

    Inputs: source, target, lengths, sampling
        See :class:`Encoder` and :class:`Decoder`; `lengths` are the source's. Rows of the target may be padded: what
        comes after a token does not change its logits, and a loss leaves the padding out (`ignore_index`).

    Outputs: logits, state
        * **logits**: of the token after each of the target's.
        * **state**: of the decoder; ``state.weights`` are the attention weights.

    Attributes:
        bridge: a :class:`Bridge` between the two.

    Raises:
        ValueError: networks or arguments that do not fit each other.

    Example::

        >>> encoder = rnnkern.seq2seq.Encoder(100, 16, 32, bidirectional=True)
        >>> decoder = rnnkern.seq2seq.Decoder(50, 16, 64, attention="dot", source_size=encoder.output_size)
        >>> model = rnnkern.seq2seq.Seq2Seq(encoder, decoder)
        >>> source, target = torch.randint(100, (9, 4)), torch.randint(50, (7, 4))
        >>> logits, state = model(source, target[:-1], lengths=[9, 3, 5, 9])
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        size = None if decoder.attention is None else decoder.attention.source_size
        if size not in (None, encoder.output_size):
            raise ValueError(f"Seq2Seq: the decoder reads a source of {size} features, it has {encoder.output_size}")
        if encoder.rnn.batch_first != decoder.batch_first:
            raise ValueError("Seq2Seq: batch_first: expected the same for encoder and decoder")
        self.encoder, self.decoder, self.bridge = encoder, decoder, Bridge(encoder, decoder)

    def start(self, source: Tensor, lengths: Lengths | None = None) -> DecoderState:
        """Reads the source; the decoder's state before its first step."""
        output, hx = self.encoder(source, lengths)
        if self.decoder.attention is None:
            return self.decoder.start(self.bridge(hx))
        return self.decoder.start(self.bridge(hx), output, lengths)

    def forward(
        self, source: Tensor, target: Tensor, lengths: Lengths | None = None, *, sampling: float = 0.0
    ) -> tuple[Tensor, DecoderState]:
        return self.decoder(target, self.start(source, lengths), sampling=sampling)
