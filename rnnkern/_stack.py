"""What modules of cells that torch.nn does not have are made of: torch.nn.RNNBase's form, and that of its cells.

They are neither: whoever asks for one takes it for one of torch's three kinds, and gives it to torch's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear

from rnnkern._run import real, unwatched
from rnnkern.autograd import Group
from rnnkern.backends.base import accumulation_dtype
from rnnkern.cells import CELLS


class Beyond(torch.nn.Module):
    """Parameters, their names and initial values as torch.nn has them."""

    _cell: str  # name in CELLS
    _flat_weights_names: list[str]
    hidden_size: int
    bias: bool

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks for, to compile it in place of a module."""
        raise RuntimeError(f"torch.jit.script cannot compile rnnkern.{type(self).__name__}; torch.export can follow it")

    def _make(self, widths: dict[str, int], device: Any, dtype: torch.dtype | None) -> None:
        """The weights of every layer and direction, by the end of their names and the features that they read."""
        self._flat_weights_names = []
        for end, width in widths.items():
            for name, shape in self._shapes(width).items():
                self._flat_weights_names.append(name + end)
                empty = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name + end, torch.nn.Parameter(empty))
        self.reset_parameters()

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Of the weights of one direction that reads so many features, in the order of a flat list."""
        spec, H = CELLS[self._cell], self.hidden_size
        wide = len(spec.gates) * H
        weights: dict[str, tuple[int, ...]] = {"weight_ih": (wide, width), "weight_hh": spec.recurrent_shape(H, H)}
        return weights | ({"bias_ih": (wide,), "bias_hh": (wide,)} if self.bias else {})

    def _named(self, name: str) -> list[str]:
        """Those of the weights that are called so, in every layer and direction."""
        return [found for found in self._flat_weights_names if found.startswith(name)]

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0
        for weight in self.parameters():
            torch.nn.init.uniform_(weight, -bound, bound)


class Stack(Beyond):
    """Layers: constructor, errors and repr as torch.nn.RNNBase has them."""

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
        sides, above = ("", "_reverse")[: 1 + bidirectional], hidden_size * (1 + bidirectional)
        widths = {f"_l{k}{side}": above if k else input_size for k in range(num_layers) for side in sides}
        self._make(widths, device, dtype)

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


class Step(Beyond):
    """One step: constructor, errors and repr as torch.nn.GRUCell has them."""

    _heads = 0  # as of modules of layers, and so is the next
    _project: Any = None
    _gates_of_step: Any = None  # what _fast.step asks for where there is a projection

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        torch.nn.GRUCell(input_size, hidden_size, bias, device="meta")  # torch's own errors and warnings
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._make({"": input_size}, device, dtype)
        if not bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is True else f", bias={self.bias}")


class Independent(Beyond):
    """IndRNN."""

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        if nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity  # says which cell this is
        super().__init__(*args, **kwargs)

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"indrnn_{self.nonlinearity}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._named("weight_hh"):
            torch.nn.init.uniform_(getattr(self, name))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "relu" else f", nonlinearity={self.nonlinearity}")


class BatchNormed(Beyond):
    """LiGRU."""

    _cell = "ligru"
    momentum, eps = 0.1, 1e-5

    def __init__(self, *args: Any, batch_norm: bool = True, **kwargs: Any) -> None:
        self.batch_norm = False  # there is nothing of it yet
        super().__init__(*args, **kwargs)
        self.batch_norm = batch_norm
        if not batch_norm:
            return
        for end in self._ends_of_names():
            like = getattr(self, "weight_ih" + end).detach()
            self.register_parameter("bn_ih" + end, torch.nn.Parameter(like.new_ones(like.shape[0])))
            self.register_buffer("bn_mean" + end, like.new_zeros(like.shape[0]))
            self.register_buffer("bn_var" + end, like.new_ones(like.shape[0]))

    def _ends_of_names(self) -> list[str]:
        return [name.removeprefix("weight_ih") for name in self._named("weight_ih")]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for end in self._ends_of_names() if self.batch_norm else ():
            for name, value in (("bn_ih", 1.0), ("bn_mean", 0.0), ("bn_var", 1.0)):
                torch.nn.init.constant_(getattr(self, name + end), value)

    @property
    def _project(self) -> Any:
        return self._normalised if self.batch_norm else None

    def _normalised(
        self, k: int, x: Tensor, groups: Sequence[Group], exist: Tensor | None
    ) -> tuple[Tensor, Sequence[Group]]:
        """What _call.stack asks of a projection."""
        columns, rest = [], []
        if exist is not None:  # nothing is known of padding, and NaN times a gradient of 0 is NaN
            x = x.masked_fill(~exist.unsqueeze(1), 0)
        ends = self._ends_of_names()[k * len(groups) : (k + 1) * len(groups)]
        for end, (w_ih, b_ih, params) in zip(ends, groups, strict=True):
            assert w_ih is not None
            columns.append(self._gates(end, x, w_ih, b_ih, exist))
            rest.append(Group(None, None, params))
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, 1), rest

    def _gates(self, end: str, x: Tensor, w_ih: Tensor, b_ih: Tensor | None, exist: Tensor | None = None) -> Tensor:
        """Pre-activations of one direction."""
        gain, mean, var = (getattr(self, name + end) for name in ("bn_ih", "bn_mean", "bn_var"))
        product = linear(x, w_ih)
        if exist is None or not self.training:
            shift = None if b_ih is None else b_ih.to(gain.dtype)  # not that of the others under autocast
            return batch_norm(product, mean, var, gain, shift, self.training, self.momentum, self.eps)
        gx = self._over_existing(product, exist.unsqueeze(1), mean, var) * gain
        return (gx if b_ih is None else gx + b_ih).to(x.dtype)

    @property
    def _gates_of_step(self) -> Any:
        return self._in_evaluation if self.batch_norm else None

    def _in_evaluation(self, x: Tensor) -> Tensor | None:
        """A cell's `_gates`, where they change nothing; None too where an error is to be found."""
        w_ih, b_ih = self._parameters.get("weight_ih"), self._parameters.get("bias_ih")
        wide = 2 * self.hidden_size
        if self.training or x.dim() != 2 or w_ih is None or (x.dtype, x.device) != (w_ih.dtype, w_ih.device):
            return None
        if w_ih.shape != (wide, x.shape[-1]) or (b_ih is not None and b_ih.shape != (wide,)):
            return None
        return self._gates("", x, w_ih, b_ih)

    def _folded(self, end: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`weight_ih` and `bias_ih` that have normalisation by the running estimates in them."""
        names = ("weight_ih", "bn_ih", "bn_mean", "bn_var")
        weight, gain, mean, var = (getattr(self, name + end).detach().to(dtype) for name in names)
        scale = gain * (var + self.eps).rsqrt()
        shift = -mean * scale
        bias = getattr(self, "bias_ih" + end, None)
        return weight * scale.unsqueeze(1), shift if bias is None else shift + bias.detach().to(dtype)

    def _over_existing(self, product: Tensor, exist: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Batch normalisation of the rows that exist; without looking for them, which would wait for a GPU."""
        product = product.to(accumulation_dtype(product.dtype))
        rows = exist.sum()
        if exist.is_cpu and unwatched() and real((product, exist)) and rows == 1:
            raise ValueError("Expected more than 1 value per channel when training, got one row that exists")
        count = rows.clamp_min(1).to(product.dtype)
        centre = product.masked_fill(~exist, 0).sum(0) / count
        spread = (product - centre).masked_fill(~exist, 0).square().sum(0) / count
        with torch.no_grad():
            moved = self.momentum * (rows > 0).to(mean.dtype)  # by no rows, not at all
            mean.lerp_(centre.to(mean.dtype), moved)
            var.lerp_((spread * (count / (count - 1).clamp_min(1))).to(var.dtype), moved)
        return (product - centre) * (spread + self.eps).rsqrt()

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.batch_norm else ", batch_norm=False")


class Heads(Beyond):
    """sLSTM."""

    _cell = "slstm"

    def __init__(self, *args: Any, num_heads: int = 1, **kwargs: Any) -> None:
        self.num_heads = self._heads = num_heads
        super().__init__(*args, **kwargs)

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        H, heads = self.hidden_size, self.num_heads
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or H % heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {H}, got {heads!r}")
        shapes = super()._shapes(width)
        shapes["weight_hh"] = (4 * H, H // heads)
        return {name: (heads, rows // heads, *rest) for name, (rows, *rest) in shapes.items()}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._named("bias_ih"):
            of_f = getattr(self, name).detach().chunk(4, 1)[1]
            of_f.copy_(torch.linspace(3, 6, of_f.shape[1], device=of_f.device, dtype=of_f.dtype))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.num_heads == 1 else f", num_heads={self.num_heads}")
