"""Scores between a decoder's states and the source's, and the mean of the source under them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnkern import _checks
from rnnkern._call import Lengths

KINDS = ("dot", "additive", "multiplicative")


class Source(NamedTuple):
    """What attention reads, prepared once for all steps of a decoder."""

    values: Tensor  # [N, L, S]
    keys: Tensor  # [N, L, A]: what queries are compared with
    padding: Tensor | None  # bool [N, L]

    def index_select(self, rows: Tensor) -> Source:
        padding = None if self.padding is None else self.padding.index_select(0, rows)
        return Source(self.values.index_select(0, rows), self.keys.index_select(0, rows), padding)


class Attention(nn.Module):
    r"""Attention over a source: weights that add up to one, and the context, the source's mean under them.

    .. math::
        \begin{array}{ll}
            e_{tl} = q_t^\top s_l & \text{dot} \\
            e_{tl} = q_t^\top W s_l & \text{multiplicative} \\
            e_{tl} = v^\top \tanh(W q_t + U s_l) & \text{additive} \\
            \alpha_{tl} = \exp e_{tl} / \sum_{l'} \exp e_{tl'}, \quad c_t = \sum_l \alpha_{tl} s_l
        \end{array}

    Dot and multiplicative: Luong et al. 2015 ("Effective approaches to attention-based neural machine translation",
    eq. 8; its "general" is the multiplicative one). Additive: Bahdanau et al. 2015 ("Neural machine translation by
    jointly learning to align and translate", A.1.2).

    Args:
        kind: ``"dot"``, ``"multiplicative"`` or ``"additive"``.
        query_size: features of a query.
        source_size: features of a step of the source; with ``"dot"`` the same as `query_size`.
        hidden_size: rows of `W` and `U` where attention is additive, ignored elsewhere. Default: `query_size`
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: query, source
        * **query**: the decoder's states.
        * **source**: what :meth:`prepare` made of the encoder's outputs.

    Outputs: context, weights
        * **context**: of every query. A row whose source has no steps has a context of zeros.
        * **weights**: 0 where the source is padding.

    Shape:
        - query: `(T, N, query_size)`
        - context: `(T, N, source_size)`
        - weights: `(T, N, L)`

        Additive attention holds `(N, T, L, hidden_size)` numbers for a moment, and for the backward.

    Raises:
        ValueError: an unknown kind, or sizes that do not fit.

    Example::

        >>> attention = rnnkern.seq2seq.Attention("additive", 20, 30)
        >>> source = attention.prepare(torch.randn(7, 2, 30), lengths=[7, 4])
        >>> context, weights = attention(torch.randn(5, 2, 20), source)
    """

    def __init__(
        self,
        kind: str,
        query_size: int,
        source_size: int,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"attention: expected one of {', '.join(KINDS)}, or None, got {kind!r}")
        if kind == "dot" and query_size != source_size:
            raise ValueError(
                f"attention 'dot': expected as many features in the source as in the decoder's states, {query_size}, "
                f"got {source_size}; 'multiplicative' and 'additive' take any"
            )
        self.kind, self.query_size, self.source_size = kind, query_size, source_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind == "multiplicative":
            self.key = nn.Linear(source_size, query_size, bias=False, **options)
        elif kind == "additive":
            hidden_size = hidden_size or query_size
            self.key = nn.Linear(source_size, hidden_size, bias=False, **options)
            self.query = nn.Linear(query_size, hidden_size, bias=False, **options)
            self.score = nn.Linear(hidden_size, 1, bias=False, **options)

    def prepare(self, source: Tensor, lengths: Lengths | None = None) -> Source:
        """Keys and padding of a source `(L, N, source_size)`, of which row n has `lengths[n]` steps."""
        values, padding = source.transpose(0, 1), None
        if source.shape[-1] != self.source_size:
            raise ValueError(f"attention: expected a source of {self.source_size} features, got {source.shape[-1]}")
        if lengths is not None:
            L, N = source.shape[:2]
            lengths = _checks.lengths(lengths, L, N, source.device, False, True)
            padding = torch.arange(source.shape[0], device=source.device) >= lengths[:, None]
            values = values.masked_fill(padding.unsqueeze(-1), 0)  # a weight of 0 would not do: NaN stays NaN
        return Source(values, values if self.kind == "dot" else self.key(values), padding)

    def forward(self, query: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        q = query.transpose(0, 1)
        if self.kind == "additive":
            scores = self.score(torch.tanh(self.query(q).unsqueeze(2) + source.keys.unsqueeze(1))).squeeze(-1)
        else:
            scores = q @ source.keys.transpose(1, 2)  # [N, T, L]
        if source.padding is None:
            weights = scores.softmax(-1)
        else:
            # Not -inf: a row that is all padding would be NaN, and so would every gradient of the batch.
            hidden = source.padding.unsqueeze(1)
            lowest = torch.finfo(scores.dtype).min
            weights = scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)
        return (weights @ source.values).transpose(0, 1), weights.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, {self.query_size}, {self.source_size}"
