"""Steps of a sequence as it comes: a module's weights packed once, its states kept from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import _checks, _fast, _stream, dispatch
from rnnkern._options import PLAIN

Rows = Tensor | Sequence[int] | Sequence[bool]
State = Tensor | tuple[Tensor, ...]


class Stream:
    r"""A recurrent module that runs step by step, for sequences that come as one goes.

    The module's weights are copied and packed once, when the stream is made, and the states stay inside: a step is one
    call with nothing to prepare. It computes what the module computes in evaluation mode (no dropout, batch norm by the
    running estimates) without gradients. Weights that change in the module later do not matter until :meth:`refresh`.

    Args:
        module: an RNN, LSTM, GRU, MGU, IndRNN, LiGRU or SLSTM or a cell of them, of torch.nn or rnnkern; not
            bidirectional, without forward hooks. Any number of layers and heads, `proj_size`, with or without bias.
            With rnnkern's options too, as they are in evaluation: `zoneout` is its fixed mixture, dropouts are none.
        batch_size: number of streams that run side by side, each with states of its own. Default: 1
        dtype: dtype of inputs, outputs and states. Default: that of the module's weights
        weights: how the weight matrices are kept: ``None`` as in `dtype`; ``"bf16"``; ``"int8"``, symmetric with a
            scale for each row. Fewer bytes are faster, because every step reads all of them. Inputs, states, sums and
            vectors (IndRNN's `weight_hh`) keep their precision; with ``"int8"`` on processors with AVX2 or AVX-512, `x`
            and `h` are multiplied as 16-bit integers, scaled by the largest of their row. Relative L2 error of `h` over
            1000 steps, measured: bf16 0.1 to 0.24 %, int8 0.27 to 0.4 % with initial and 0.4 to 0.8 % with trained
            weights. Default: ``None``
        out: tensor `(batch_size, H_out)` that every :meth:`step` writes to and returns; without it every step returns a
            fresh one. What an earlier step returned is then gone. Default: ``None``

    Attributes:
        batch_size, dtype, device: as given, or the module's.
        backend: ``"cpp"``, or ``"functional"`` where the steps go through :mod:`rnnkern.functional` (on a GPU, without
            the extension, of a module with `zoneout`, `layer_norm`, `peephole`, `cell_clip` or `proj_clip`, or inside
            :class:`rnnkern.use_backend` with another name when the stream was made): the same numbers, but slower.

    A stream runs on the thread that calls it. Several streams may run in several threads at once; steps of more than
    some 20 microseconds let other Python threads run meanwhile. Two threads in one stream at once are an error.

    Raises:
        TypeError: not such a module, or one whose forward is not torch.nn's or rnnkern's.
        ValueError: a bidirectional module, a batch size below 1, an unknown form of weights, or one for float64; `out`
            that does not fit; weights for int8 that are not finite.
        RuntimeError: later, a call while another thread is in this stream.

    Example::

        >>> stream = rnnkern.Stream(torch.nn.LSTM(10, 20, 2), weights="bf16")
        >>> for x in torch.randn(6, 1, 10):
        ...     y = stream.step(x)
    """

    def __init__(
        self,
        module: torch.nn.Module,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        out: Tensor | None = None,
    ) -> None:
        self._shape = _stream.Shape.of(module)
        first = getattr(module, "weight_ih" + self._shape.suffix)
        self._module, self._weights = module, weights
        self.batch_size, self.dtype, self.device = batch_size, dtype or first.dtype, first.device
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Stream: batch_size must be an integer of 1 or more, got {batch_size!r}")
        if self.dtype not in dispatch.DTYPES:
            raise ValueError(f"Stream: expected float64, float32, bfloat16 or float16, got {self.dtype}")
        if weights not in _stream.FORMS:
            raise ValueError(f"Stream: weights must be None, 'bf16' or 'int8', got {weights!r}")
        if weights is not None and self.dtype == torch.float64:
            raise ValueError(f"Stream: weights={weights!r} is not for float64: give dtype=torch.float32 as well")
        widest = max(self._shape.I, self._shape.H)
        if weights == "int8" and widest > _stream.WIDEST:
            raise ValueError(f"Stream: weights='int8' takes up to {_stream.WIDEST} features, got {widest}")
        if out is not None:
            self._expect(out, (batch_size, self._shape.P), "out")
            if not out.is_contiguous() or out.requires_grad:
                raise ValueError("Stream: out must be contiguous and must not require a gradient")
        self._out = out
        self._engine = self._native() or _stream.Functional(self._shape, batch_size, self.dtype, self.device)
        self.backend = "functional" if isinstance(self._engine, _stream.Functional) else "cpp"
        self.refresh()

    def _native(self) -> Any:
        """The extension's stream, or None where it is not to be used."""
        s = self._shape
        if self.device.type != "cpu" or dispatch.requested() not in (None, "cpp") or not s.I or not _fast.available():
            return None
        if s.options != PLAIN:
            return None
        from rnnkern import _cpu
        from rnnkern.backends import cpp

        form = _stream.FORMS["bf16" if self.dtype == torch.bfloat16 and self._weights is None else self._weights]
        cell, dtype = cpp.CELL_NUMBERS[s.cell], cpp.DTYPE_NUMBERS[self.dtype]
        return _cpu.Stream(cpp.BACKEND.isa, cell, dtype, form, *s.native(self.batch_size, s.I))

    def __repr__(self) -> str:
        return (
            f"Stream({self._module!r}, batch_size={self.batch_size}, dtype={self.dtype}, weights={self._weights!r}, "
            f"backend={self.backend!r})"
        )

    def refresh(self) -> None:
        """Takes a new snapshot of the module's weights; states stay.

        Raises:
            RuntimeError: the module is on another device now, or its sizes are others.
        """
        shape = _stream.Shape.of(self._module)
        device = getattr(self._module, "weight_ih" + shape.suffix).device
        if shape != self._shape or device != self.device:
            raise RuntimeError(
                f"Stream: made for {self._shape} on {self.device}, the module is now {shape} on {device}"
            )
        if not self._engine.pack(*_stream.snapshot(self._module, shape, self.dtype, self._weights)):
            raise RuntimeError("Stream: weights without numbers to read (of a transform or a trace?)")

    def step(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        r"""One step of every stream, or of some rows of the batch while the others rest.

        Args:
            x: input `(batch_size, H_in)`. Rows at rest are not read.
            rows: those that advance: a bool mask `(batch_size)` or indices, each once. Default: all

        Returns:
            Outputs of the last layer `(batch_size, H_out)`, zero in rows at rest: a fresh tensor, or `out`.

        Raises:
            TypeError, ValueError, IndexError: an input or rows that do not fit; the states stay as they were.
            RuntimeError: another thread is in this stream.

        Example::

            >>> stream = rnnkern.Stream(torch.nn.GRU(10, 20), batch_size=3)
            >>> y = stream.step(torch.randn(3, 10), rows=[0, 2])
        """
        y = self._engine.step(x, rows, self._out)
        return self._other_step(x, rows) if y is None else y

    def _other_step(self, x: Any, rows: Any) -> Tensor:
        """A step whose arguments are not what the engine takes as they are: made so, or refused."""
        self._expect(x, (self.batch_size, self._shape.I), "x")
        y = self._engine.step(_plain(x), self._mask(rows), self._out)
        if y is None:
            raise TypeError(f"Stream: x has no numbers to read (a {type(x).__name__} of a transform or a trace?)")
        return y

    def run(self, x: Tensor) -> Tensor:
        r"""A chunk of steps, from the states as they are.

        Args:
            x: `(L, batch_size, H_in)`, or `(batch_size, L, H_in)` where the module is `batch_first`; with
                batch_size 1 also `(L, H_in)`.

        Returns:
            Outputs of the last layer in the same layout, always a fresh tensor.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`step`; no time steps.
        """
        batch_first = self._shape.batch_first
        if isinstance(x, Tensor) and x.dim() == 2 and self.batch_size == 1:
            batch = 0 if batch_first else 1
            return self.run(x.unsqueeze(batch)).squeeze(batch)
        T = x.size(int(batch_first)) if isinstance(x, Tensor) and x.dim() == 3 else 1
        size = (self.batch_size, T) if batch_first else (T, self.batch_size)
        self._expect(x, (*size, self._shape.I), "x")
        _checks.steps(T)
        y = torch.empty((*size, self._shape.P), dtype=self.dtype, device=self.device)
        if not self._engine.run(_plain(x), y, batch_first):
            raise TypeError(f"Stream: x has no numbers to read (a {type(x).__name__} of a transform or a trace?)")
        return y

    def reset(self, rows: Rows | None = None) -> None:
        """Sets the states of all rows, or of those that `rows` names as in :meth:`step`, to zero."""
        self._engine.write(self._mask(rows))

    @property
    def state(self) -> State:
        """A copy of the states as the module takes them in `hx`; assigning sets them, None to zero.

        In bfloat16 and float16 all states but `h` are kept in float32 from step to step: rounded here.
        """
        sizes = self._shape.sizes(self.batch_size)
        states = [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes]
        self._engine.read(*states)
        if self._shape.is_cell:
            states = [s.squeeze(0) for s in states]
        return tuple(states) if len(states) > 1 else states[0]

    @state.setter
    def state(self, value: State | None) -> None:
        if value is None:
            return self.reset()
        states = (value,) if isinstance(value, Tensor) else tuple(value)
        sizes = self._shape.sizes(self.batch_size)
        if len(states) != len(sizes):
            raise ValueError(f"Stream: expected a state of {len(sizes)} tensors, got {len(states)}")
        for state, size in zip(states, sizes, strict=True):
            self._expect(state, size[1:] if self._shape.is_cell else size, "state")
        plain = (_plain(s).view(size) for s, size in zip(states, sizes, strict=True))
        if not self._engine.write(None, *plain):
            raise TypeError("Stream: a state without numbers to read (of a transform or a trace?)")

    def _expect(self, value: Any, size: tuple[int, ...], name: str) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"Stream: expected {name} to be a tensor, got {type(value).__name__}")
        if tuple(value.shape) != size:
            raise ValueError(f"Stream: expected {name} of shape {list(size)}, got {list(value.shape)}")
        if value.dtype != self.dtype:
            raise ValueError(f"Stream: expected {name} of dtype {self.dtype}, got {value.dtype}")
        if value.device != self.device:
            raise ValueError(f"Stream: expected {name} on {self.device}, got {value.device}")

    def _mask(self, rows: Any) -> Tensor | None:
        """Rows as a bool mask on the CPU."""
        if rows is None:
            return None
        B = self.batch_size
        given = rows.detach().cpu() if isinstance(rows, Tensor) else torch.as_tensor(rows)
        if given.dtype == torch.bool:
            if given.shape != (B,):
                raise ValueError(f"Stream: expected a mask of rows of shape [{B}], got {list(given.shape)}")
            return _plain(given)
        mask = torch.zeros(B, dtype=torch.bool)
        if given.shape == (0,):
            return mask
        # uint8 was torch's mask before it had bool, and would be read as rows 0 and 1
        if given.dtype not in _checks.INTEGERS or given.dtype == torch.uint8 or given.dim() != 1:
            raise ValueError(
                f"Stream: rows: expected a bool mask or a list of indices, got {given.dim()}-D {given.dtype}"
            )
        index = given.long()
        if index.min() < -B or index.max() >= B:
            raise IndexError(f"Stream: rows must lie in [{-B}, {B - 1}], got {index.tolist()}")
        mask[index] = True
        if int(mask.sum()) != index.numel():
            raise ValueError(f"Stream: rows: expected each row once, got {index.tolist()}")
        return mask


def _plain(x: Tensor) -> Tensor:
    """Of torch's own type, contiguous, as what lies in memory."""
    return x.detach().as_subclass(Tensor).resolve_neg().contiguous()
