"""What all modules have beyond torch.nn's: the options of regularised and richer cells, the same for all.

`Options` holds them and says what is wrong with them, `Extended` gives them to the modules, functions take them as
keywords; what they do to a layer's call is in _regularised.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from rnnkern import _checks
from rnnkern.cells import CELLS

MODES = ("sequence", "step", "candidate")
NO_PROJECTION = "proj_clip: there is no projection to clip (LSTM's proj_size above 0)"


class Keywords(TypedDict, total=False):
    """The options as functions and constructors take them; :class:`rnnkern.LSTM` says what each does."""

    recurrent_dropout: float
    recurrent_dropout_mode: str
    zoneout: float | tuple[float, float]
    weight_dropout: float
    cell_clip: float
    proj_clip: float
    grad_clip: float
    layer_norm: bool
    peephole: bool


@dataclass(frozen=True)
class Options:
    recurrent_dropout: float = 0.0
    recurrent_dropout_mode: str = "sequence"
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    grad_clip: float = 0.0
    layer_norm: bool = False
    peephole: bool = False

    @property
    def shares(self) -> tuple[float, float]:
        """The probabilities with which h and c are zoned out."""
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)

    def extra(self, cell: str) -> tuple[str, ...]:
        """Names of the parameters of every layer and direction that these options add, in the order of a flat list."""
        norm = ("ln_ih", "ln_hh") if self.layer_norm else ()
        kinds = (("peephole_", self.peephole), ("ln_c", self.layer_norm))
        return (*norm, *(p for p in CELLS[cell].small if any(on and p.startswith(kind) for kind, on in kinds)))

    def scanned(self, training: bool) -> str:
        """Those that change the scan of a call, as words; empty: it is a plain one."""
        masks = ("recurrent_dropout",) if training else ()
        names = (*masks, "zoneout", "cell_clip", "proj_clip", "grad_clip", "layer_norm", "peephole")
        return ", ".join(f"{name}=" for name in names if getattr(self, name) not in (0.0, (0.0, 0.0)))

    def values(self) -> tuple[Any, ...]:
        """``Options(*values)`` are these."""
        return tuple(getattr(self, name) for name in NAMES)

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return "".join(f", {name}={value}" for name, value, default in values if value != default)


PLAIN = Options()
NAMES = tuple(f.name for f in fields(Options))  # Dynamo cannot ask a class for its fields


def options(title: str, cell: str, projected: bool, given: Keywords) -> Options:
    """Checked options of a module or function called `title`.

    Raises:
        TypeError: a keyword that is none of them.
        ValueError: a value out of range, or an option that the cell does not have.
    """
    for name in given:
        if name not in NAMES:
            raise TypeError(f"{title}: got an unexpected keyword argument {name!r}")
    found = Options(**given)
    spec = CELLS[cell]
    zoneout = found.zoneout
    if isinstance(zoneout, (tuple, list)):
        if len(spec.states) == 1:
            raise ValueError(f"zoneout: {title} has one state, expected one probability, got {zoneout}")
        if len(zoneout) != 2:
            raise ValueError(f"zoneout: expected a probability or those of (h, c), got {zoneout}")
        for p in zoneout:
            _probability("zoneout", p)
        found = replace(found, zoneout=(zoneout[0], zoneout[1]))
    else:
        _probability("zoneout", zoneout)
    _probability("recurrent_dropout", found.recurrent_dropout)
    _probability("weight_dropout", found.weight_dropout)
    for name in ("cell_clip", "proj_clip", "grad_clip"):
        value = getattr(found, name)
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a bound above 0, or 0 for none, got {value!r}")
    for name in ("layer_norm", "peephole"):
        if not isinstance(getattr(found, name), bool):
            raise ValueError(f"{name}: expected True or False, got {getattr(found, name)!r}")
    mode = found.recurrent_dropout_mode
    if mode not in MODES:
        raise ValueError(f"recurrent_dropout_mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "candidate" and "candidate" not in CELLS[cell].masks:
        having = ", ".join(name for name, other in CELLS.items() if "candidate" in other.masks)
        raise ValueError(f"recurrent_dropout_mode='candidate': {title} has no candidate, only {having} have")
    if found.peephole and "peephole_i" not in CELLS[cell].small:
        raise ValueError(f"peephole: {title} has no peepholes, only LSTM has")
    if spec.scaled and found.shares != (0.0, 0.0):
        raise ValueError(f"zoneout: {title}'s c, n and m are one value in three parts, which have no mixture")
    if spec.scaled and found.layer_norm:
        raise ValueError(f"layer_norm: {title} normalises its state by n, and has no other; its output may have a norm")
    if found.cell_clip and not spec.has_c:
        raise ValueError(f"cell_clip: {title} has no cell state to bound, only LSTM has")
    if found.proj_clip and not projected:
        raise ValueError(NO_PROJECTION)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _probability(name: str, p: Any) -> None:
    if not _is_number(p) or not 0 <= p < 1:
        raise ValueError(f"{name}: expected a probability from 0 to below 1, got {p!r}")


def _attribute(name: str) -> property:
    """An option as an attribute of the module, which may be given another value as torch.nn's dropout may."""

    def get(self: Extended) -> Any:
        return getattr(self.options, name)

    def set(self: Extended, value: Any) -> None:
        if name in ("layer_norm", "peephole") and value != get(self):
            raise AttributeError(f"{name}: fixed when the module is made, for it has parameters of its own")
        given: Any = dict(zip(NAMES, self.options.values(), strict=True)) | {name: value}
        self._take(options(type(self).__name__, self._cell, self.proj_size > 0, given))

    return property(get, set)


class Extended(torch.nn.Module):
    """What rnnkern's modules have in common beyond torch.nn's: laid over torch.nn.RNNBase, or Stack for other cells.

    Defaults are of the class: accelerate(model) makes instances that know nothing of them, and a module without options
    is torch.nn's in every attribute.
    """

    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    all_weights: Any
    _cell: str  # name in CELLS
    _flat_weights_names: list[str]

    memory = "save"
    options = PLAIN
    _heads = 0  # with them, every parameter has them as its first dimension
    _project: Any = None  # makes a layer's pre-activations in its own way, see _call.stack
    recurrent_dropout = _attribute("recurrent_dropout")
    recurrent_dropout_mode = _attribute("recurrent_dropout_mode")
    zoneout = _attribute("zoneout")
    weight_dropout = _attribute("weight_dropout")
    cell_clip = _attribute("cell_clip")
    proj_clip = _attribute("proj_clip")
    grad_clip = _attribute("grad_clip")
    layer_norm = _attribute("layer_norm")
    peephole = _attribute("peephole")

    def __init__(self, *args: Any, memory: str = "save", **kwargs: Any) -> None:
        ours = {name: kwargs.pop(name) for name in Keywords.__annotations__ if name in kwargs}
        super().__init__(*args, **kwargs)
        _checks.memory(memory)
        if memory != "save":
            self.memory = memory
        if ours:
            self._take(options(type(self).__name__, self._cell, self.proj_size > 0, ours))  # type: ignore[arg-type]
            self._add_parameters()

    def _take(self, options: Options) -> None:
        if options != PLAIN:
            self.options = options
        else:
            self.__dict__.pop("options", None)

    def _add_parameters(self) -> None:
        H, like, names = self.hidden_size, self.all_weights[0][0], self._extra_names()
        for name in names:
            width = like.shape[0] if name.startswith(("ln_ih", "ln_hh")) else H
            self.register_parameter(name, torch.nn.Parameter(like.detach().new_empty(width)))
        for name in names:
            if name.startswith("peephole"):
                torch.nn.init.uniform_(getattr(self, name), -(H**-0.5), H**-0.5)
        self._reset_norms()

    def _extra_names(self) -> list[str]:
        """Of the parameters beyond torch.nn's, in the order of their layers and directions."""
        ends = self._ends(range(self.num_layers))
        return [name + end for end in ends for name in self.options.extra(self._cell)]

    def _ends(self, layers: Iterable[int]) -> list[str]:
        """Of the names of these layers' parameters, in every direction."""
        sides = ("", "_reverse")[: 1 + self.bidirectional]
        return [f"_l{k}{side}" for k in layers for side in sides]

    def _reset_norms(self) -> None:
        for name in self._extra_names():
            if name.startswith("ln_"):
                torch.nn.init.constant_(getattr(self, name), 0.0 if "bias" in name else 1.0)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if self.options.layer_norm and "ln_ih_l0" in self._parameters:
            self._reset_norms()

    def extra_repr(self) -> str:
        memory = "" if self.memory == "save" else f", memory={self.memory}"
        return super().extra_repr() + memory + str(self.options)

    def _weights(self) -> list[Tensor]:
        """The flat list that functions take, each read by its name: it may be parametrized, or no parameter at all."""
        found, names = self._parameters, self._flat_weights_names
        if self.options is not PLAIN and (self.options.layer_norm or self.options.peephole):
            extra = self._extra_names()
            groups = self.num_layers * (1 + self.bidirectional)
            a, b = len(names) // groups, len(extra) // groups
            names = [v for k in range(groups) for v in (*names[k * a : k * a + a], *extra[k * b : k * b + b])]
        weights = [found.get(name) for name in names]
        return [getattr(self, name) if w is None else w for name, w in zip(names, weights, strict=True)]
