"""The decoder: token after token, with or without attention, a whole target at once or step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern._call import Lengths
from rnnkern.seq2seq._attention import Attention, Source
from rnnkern.seq2seq._encoder import recurrent_class, token_ids

FORMS = ("luong", "bahdanau")


@dataclass(frozen=True)
class DecoderState:
    """All that a decoder knows between two steps; :meth:`Decoder.start` makes the first, every step the next.

    Attributes:
        hx: states of the recurrent network, as it takes them: `(num_layers, N, H)`, for LSTM a pair.
        readout: the readout of the step before, `(N, H)`, where the decoder feeds it to the next; else None.
        source: what attention reads, prepared; None without attention.
        weights: attention weights of the steps just done, `(T, N, L)` after a call of the decoder (`(N, T, L)` with
            `batch_first`), `(N, L)` after a step; None without attention and at the start.
    """

    hx: Any
    readout: Tensor | None = None
    source: Source | None = None
    weights: Tensor | None = None

    def index_select(self, rows: Tensor) -> DecoderState:
        """The state of these rows of the batch, in this order, repeated if named more than once: what a beam search
        keeps of its beams. `weights` are left behind."""
        return DecoderState(
            tuple(h.index_select(1, rows) for h in self.hx)
            if isinstance(self.hx, tuple)
            else self.hx.index_select(1, rows),
            None if self.readout is None else self.readout.index_select(0, rows),
            None if self.source is None else self.source.index_select(rows),
        )


class Decoder(nn.Module):
    r"""What writes the target: an RNN, LSTM or GRU over embedded tokens, and logits of the next token at every step.

    Without attention, :math:`h_t = f(E y_t, h_{t-1})` and the logits are :math:`W_s h_t` (Sutskever et al. 2014). With
    attention, in one of two forms, of which the second has its context before the network's step:

    .. math::
        \begin{array}{lll}
            \text{luong} & h_t = f(E y_t, h_{t-1}) & c_t = \mathrm{attend}(h_t) \\
            \text{bahdanau} & c_t = \mathrm{attend}(h_{t-1}) & h_t = f([E y_t; c_t], h_{t-1}) \\
            \text{both} & \tilde h_t = \tanh(W_c [c_t; h_t]) & \text{logits}_t = W_s \tilde h_t
        \end{array}

    (Luong et al. 2015, eq. 5 and 6; Bahdanau et al. 2015, A.1.2 and A.2.2, with Luong's readout in place of their
    maxout layer). :math:`h` is the last layer's. With `input_feeding`, Luong's network reads
    :math:`[E y_t; \tilde h_{t-1}]` (their section 3.3).

    With a given target (teacher forcing) and nothing fed back, all steps are one scan of the network; Bahdanau's form,
    `input_feeding` and scheduled sampling go step by step.

    Args:
        tokens: how many different tokens there are.
        embedding_size: features of an embedded token.
        hidden_size: units of a layer.
        num_layers: number of layers. Default: 1
        cell: ``"RNN"``, ``"LSTM"`` or ``"GRU"``. Default: ``"LSTM"``
        attention: ``"dot"``, ``"multiplicative"``, ``"additive"``, see :class:`Attention`, or None. Default: ``None``
        source_size: features of the source that attention reads, an encoder's `output_size`; only with attention.
        form: ``"luong"`` or ``"bahdanau"``; only with attention. Default: ``"luong"``
        input_feeding: whether a step also reads the readout of the one before; Luong's form. Default: ``False``
        batch_first: whether targets and logits are `(N, T)` and not `(T, N)`, and the source `(N, L)`; states are not
            affected. Default: ``False``
        device: where the parameters live.
        dtype: dtype of the parameters.
        options: the other arguments of :class:`rnnkern.LSTM`: `dropout`, `zoneout`, `layer_norm`, `memory`, ...; masks
            that are one per sequence there are drawn anew for every step where the decoder goes step by step.

    Inputs: target, state, sampling
        * **target**: the tokens that the steps read: what is to be written, behind a token that begins it.
        * **state**: from :meth:`start`, or of the steps before.
        * **sampling**: probability with which a step reads, in place of the target's token, one that is drawn from
          what the step before gave (scheduled sampling, Bengio et al. 2015). The first step reads the target's. In
          training and in evaluation alike. Default: 0

    Outputs: logits, state
        * **logits**: of the token after each of the target's.
        * **state**: after the last step; ``state.weights`` are the attention weights of all of them.

    Shape:
        - target: `(T, N)`, `(N, T)` with `batch_first`
        - logits: `(T, N, V)`, `(N, T, V)` with `batch_first`

    Raises:
        ValueError: an unknown cell, attention or form, options that exclude each other, a target of another rank or
            dtype or of another batch size than the state, `sampling` outside of 0 to 1.
        TypeError: tokens that are no tensor.
        IndexError: a token number out of range.

    Example::

        >>> decoder = rnnkern.seq2seq.Decoder(100, 16, 64, attention="dot", source_size=encoder.output_size)
        >>> logits, state = decoder(target[:-1], decoder.start(hx, output, lengths))
        >>> cross_entropy(logits.flatten(0, 1), target[1:].flatten()).backward()

        >>> state, token = decoder.start(hx, output, lengths), torch.full((4,), BEGIN)
        >>> for _ in range(20):
        ...     logits, state = decoder.step(token, state)
        ...     token = logits.argmax(-1)
    """

    def __init__(
        self,
        tokens: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "LSTM",
        attention: str | None = None,
        source_size: int | None = None,
        form: str = "luong",
        input_feeding: bool = False,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        make = recurrent_class(cell)
        if form not in FORMS:
            raise ValueError(f"form: expected 'luong' or 'bahdanau', got {form!r}")
        if attention is None and (source_size is not None or form != "luong" or input_feeding):
            raise ValueError("source_size, form and input_feeding: only with attention")
        if form == "bahdanau" and input_feeding:
            raise ValueError("input_feeding: only in Luong's form; Bahdanau's feeds the context")
        if options.get("bidirectional"):
            raise ValueError("bidirectional: a decoder has no direction but the one in which it writes")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.form, self.input_feeding, self.batch_first = form, input_feeding, batch_first
        self.embedding = nn.Embedding(tokens, embedding_size, **like)
        size = options.get("proj_size") or hidden_size  # of h
        self.attention: Attention | None = None
        fed = 0
        if attention is not None:
            if source_size is None:
                raise ValueError("source_size: attention needs to know the features of the source")
            self.attention = Attention(attention, size, source_size, **like)
            self.readout = nn.Linear(source_size + size, size, bias=False, **like)
            fed = source_size if form == "bahdanau" else size if input_feeding else 0
        self.rnn = make(embedding_size + fed, hidden_size, num_layers, **like, **options)
        self.head = nn.Linear(size, tokens, **like)

    def start(
        self, hx: Any = None, source: Tensor | None = None, lengths: Lengths | None = None, *, batch_size: int = 1
    ) -> DecoderState:
        """The state before the first step.

        Args:
            hx: the network's initial states, `(num_layers, N, H)`, for LSTM a pair; zeros if not given.
            source: what attention reads, `(L, N, source_size)`, or `(N, L, source_size)` with `batch_first`: an
                encoder's output. With attention, and only then.
            lengths: how many steps of every row of the source exist; all, if not given.
            batch_size: N, where neither `hx` nor `source` tells it.
        """
        prepared = None
        if (source is None) != (self.attention is None):
            raise ValueError(
                "Decoder.start: expected a source, which attention reads"
                if source is None
                else "Decoder.start: got a source, which a decoder without attention does not read"
            )
        if source is not None and self.attention is not None:
            if source.dim() != 3:
                raise ValueError(f"Decoder.start: expected a source of 3 dimensions, got {source.dim()}")
            source = source.transpose(0, 1) if self.batch_first else source
            batch_size = source.shape[1]
            prepared = self.attention.prepare(source, lengths)
        elif lengths is not None:
            raise ValueError("Decoder.start: lengths are those of the source, and there is none")
        if hx is None:
            hx = self._zeros(batch_size)
        if isinstance(hx, tuple) != isinstance(self.rnn, nn.LSTM):
            kind = type(self.rnn).__name__
            raise ValueError(f"Decoder.start: hx: {kind} takes {'a pair' if kind == 'LSTM' else 'one tensor'}")
        first = hx[0] if isinstance(hx, tuple) else hx
        if prepared is not None and first.shape[1] != batch_size:
            raise ValueError(f"Decoder.start: hx has a batch size of {first.shape[1]}, the source of {batch_size}")
        readout = first.new_zeros(first.shape[1], self.head.in_features) if self.input_feeding else None
        return DecoderState(hx, readout, prepared)

    def _zeros(self, batch_size: int) -> Any:
        weight = self.rnn.weight_hh_l0
        h = weight.new_zeros(self.rnn.num_layers, batch_size, self.head.in_features)
        if not isinstance(self.rnn, nn.LSTM):
            return h
        return h, weight.new_zeros(self.rnn.num_layers, batch_size, self.rnn.hidden_size)

    def forward(self, target: Tensor, state: DecoderState, *, sampling: float = 0.0) -> tuple[Tensor, DecoderState]:
        token_ids("Decoder: target", target)
        if not 0.0 <= sampling <= 1.0:
            raise ValueError(f"sampling: expected a probability, got {sampling!r}")
        target = target.t() if self.batch_first else target
        self._same_batch(target.shape[1], state)
        if sampling or self.form == "bahdanau" or self.input_feeding:
            logits, state = self._stepwise(target, state, sampling)
        else:
            logits, state = self._scan(target, state)
        if self.batch_first:
            weights = None if state.weights is None else state.weights.transpose(0, 1)
            return logits.transpose(0, 1), replace(state, weights=weights)
        return logits, state

    def step(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One step: the token of every row `(N)` and the state before it to the next token's logits `(N, V)` and the
        state after it. Rows are independent: :meth:`DecoderState.index_select` may reorder them between steps."""
        if not isinstance(token, Tensor) or token.dim() != 1:
            raise ValueError("Decoder.step: expected a 1-D tensor, the token of every row")
        token_ids("Decoder.step: token", token[None])
        self._same_batch(token.shape[0], state)
        logits, state = self._step(token, state)
        weights = None if state.weights is None else state.weights[0]
        return logits[0], replace(state, weights=weights)

    def _same_batch(self, batch_size: int, state: DecoderState) -> None:
        first = state.hx[0] if isinstance(state.hx, tuple) else state.hx
        if first.shape[1] != batch_size:
            raise ValueError(f"Decoder: expected tokens of {first.shape[1]} rows, as the state has, got {batch_size}")

    def _scan(self, target: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Any number of steps at once: nothing is fed back."""
        y, hx = self.rnn(self.embedding(target), state.hx)
        if self.attention is None:
            return self.head(y), replace(state, hx=hx)
        context, weights = self.attention(y, state.source)
        return self.head(self._read(context, y)), replace(state, hx=hx, weights=weights)

    def _step(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One step in any form; logits and weights have a time dimension of 1."""
        if self.attention is None or not (self.form == "bahdanau" or self.input_feeding):
            return self._scan(token[None], state)
        x = self.embedding(token)[None]  # [1, N, E]
        if self.input_feeding:
            y, hx = self.rnn(torch.cat([x, state.readout[None]], -1), state.hx)  # type: ignore[index]
            context, weights = self.attention(y, state.source)
        else:
            before = state.hx[0] if isinstance(state.hx, tuple) else state.hx
            context, weights = self.attention(before[-1:], state.source)
            y, hx = self.rnn(torch.cat([x, context], -1), state.hx)
        readout = self._read(context, y)
        fed = readout[0] if self.input_feeding else None
        return self.head(readout), replace(state, hx=hx, readout=fed, weights=weights)

    def _read(self, context: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.readout(torch.cat([context, y], -1)))

    def _stepwise(self, target: Tensor, state: DecoderState, sampling: float) -> tuple[Tensor, DecoderState]:
        logits: list[Tensor] = []
        weights: list[Tensor] = []
        for token in target:
            if sampling and logits:
                odds = logits[-1][0].detach().float().softmax(-1)
                drawn = torch.multinomial(odds, 1).squeeze(1).to(token.dtype)
                token = torch.where(torch.rand(token.shape, device=token.device) < sampling, drawn, token)
            found, state = self._step(token, state)
            logits.append(found)
            if state.weights is not None:
                weights.append(state.weights)
        if not logits:
            raise ValueError("Decoder: expected a target of one step or more")
        return torch.cat(logits), replace(state, weights=torch.cat(weights) if weights else None)
