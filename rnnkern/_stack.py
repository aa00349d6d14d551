"""What modules of cells that torch.nn does not have are made of: torch.nn.RNNBase's form, without being one.

Whoever asks for an RNNBase takes it for one of torch's three kinds, and gives it to torch's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnkern.cells import CELLS


class Stack(torch.nn.Module):
    """Constructor, parameters, their names and initial values, errors and repr as torch.nn.RNNBase has them."""

    _cell: str  # name in CELLS
    proj_size = 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Torch's own errors and warnings.
        torch.nn.RNNBase("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         device="meta")  # fmt: skip
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self._flat_weights_names: list[str] = []
        for k in range(num_layers):
            for end in ("", "_reverse")[: 1 + bidirectional]:
                for name, shape in self._shapes(k).items():
                    self._flat_weights_names.append(f"{name}_l{k}{end}")
                    empty = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(self._flat_weights_names[-1], torch.nn.Parameter(empty))
        self.reset_parameters()

    def _shapes(self, k: int) -> dict[str, tuple[int, ...]]:
        """Of the weights that layer k has in each direction, in the order of a flat list."""
        H = self.hidden_size
        spec, width = CELLS[self._cell], H * (1 + self.bidirectional) if k else self.input_size
        wide = len(spec.gates) * H
        weights: dict[str, tuple[int, ...]] = {"weight_ih": (wide, width), "weight_hh": spec.recurrent_shape(H, H)}
        return weights | ({"bias_ih": (wide,), "bias_hh": (wide,)} if self.bias else {})

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5
        for weight in self.parameters():
            torch.nn.init.uniform_(weight, -bound, bound)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of every layer and direction."""
        names = self._flat_weights_names
        per = len(names) // (self.num_layers * (1 + self.bidirectional))
        return [[getattr(self, name) for name in names[at : at + per]] for at in range(0, len(names), per)]

    def flatten_parameters(self) -> None:
        """Nothing: torch.nn.RNNBase has it for cuDNN, which does not have these cells."""

    def extra_repr(self) -> str:
        return torch.nn.RNNBase.extra_repr(self)  # type: ignore[arg-type]
