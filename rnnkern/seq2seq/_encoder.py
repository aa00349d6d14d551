"""The encoder: an embedding and a recurrent network over a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnkern import nn as recurrent
from rnnkern._call import Lengths

CELLS: dict[str, Any] = {"RNN": recurrent.RNN, "LSTM": recurrent.LSTM, "GRU": recurrent.GRU}


def recurrent_class(cell: str) -> Any:
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    return CELLS[cell]


def token_ids(what: str, tokens: Tensor) -> None:
    """A batch of token numbers, as an embedding takes them."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{what}: expected a tensor of token numbers, got {type(tokens).__name__}")
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what}: expected a 2-D tensor of int64 or int32, got {tokens.dim()}-D {tokens.dtype}")


class Encoder(nn.Module):
    r"""What reads the source: an embedding of its tokens and an RNN, LSTM or GRU over them.

    Args:
        tokens: how many different tokens there are; None: the source is features already, and nothing is embedded.
        embedding_size: features of an embedded token, or of a step of the source.
        hidden_size: units of a layer and direction.
        num_layers: number of layers. Default: 1
        cell: ``"RNN"``, ``"LSTM"`` or ``"GRU"``. Default: ``"LSTM"``
        bidirectional: whether every layer also runs from the end of the source to its start. Default: ``False``
        batch_first: whether the source is `(N, L)` and not `(L, N)`; states are not affected. Default: ``False``
        padding_idx: token whose embedding stays zero, see :class:`torch.nn.Embedding`. Not needed with `lengths`.
            Default: ``None``
        device: where the parameters live.
        dtype: dtype of the parameters.
        options: the other arguments of :class:`rnnkern.LSTM`: `dropout`, `zoneout`, `layer_norm`, `memory`, ...

    Inputs: source, lengths
        * **source**: token numbers, int64 or int32; features if `tokens` is None.
        * **lengths**: how many steps of every row exist, in any order. Padding is neither read nor computed.

    Outputs: output, hx
        * **output**: the last layer's states at every step, both directions side by side; 0 at padding.
        * **hx**: every layer's and direction's state after the last step of each row, as the network returns it.

    Shape:
        - source: `(L, N)`, `(N, L)` with `batch_first`; with a last dimension of `embedding_size` if `tokens` is None
        - output: `(L, N, output_size)`, `(N, L, output_size)` with `batch_first`
        - hx: `(D * num_layers, N, hidden_size)`, for LSTM a pair of them

    Attributes:
        output_size: features of `output`.

    Raises:
        ValueError: an unknown cell, a source of another rank or dtype, lengths that do not fit.
        TypeError: a source that is no tensor.
        IndexError: a token number out of range.

    Example::

        >>> encoder = rnnkern.seq2seq.Encoder(100, 16, 32, bidirectional=True)
        >>> output, hx = encoder(torch.randint(100, (9, 4)), lengths=[9, 3, 5, 9])
    """

    def __init__(
        self,
        tokens: int | None,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "LSTM",
        bidirectional: bool = False,
        batch_first: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        make = recurrent_class(cell)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = None if tokens is None else nn.Embedding(tokens, embedding_size, padding_idx, **like)
        self.rnn = make(
            embedding_size, hidden_size, num_layers,
            bidirectional=bidirectional, batch_first=batch_first, **like, **options,
        )  # fmt: skip
        self.output_size: int = (self.rnn.proj_size or hidden_size) * (1 + bidirectional)

    def forward(self, source: Tensor, lengths: Lengths | None = None) -> tuple[Tensor, Any]:
        if self.embedding is not None:
            token_ids("Encoder: source", source)
            source = self.embedding(source)
        elif source.dim() != 3:
            raise ValueError(f"Encoder: source: expected a batch of features, 3-D, got {source.dim()}-D")
        if lengths is None:
            return self.rnn(source)
        return self.rnn(source, lengths=lengths)
