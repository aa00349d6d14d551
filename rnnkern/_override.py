"""override(): torch's own recurrent ops run on rnnkern, for code that nobody can edit.

torch.nn's modules, torch.lstm and TorchScript files all end in the same few aten ops, which torch composes of other ops
on every device. While an override is on, kernels stand at the CPU's and CUDA's dispatch keys of these ops, above and
below autograd, and hand over to :mod:`rnnkern.functional`. What rnnkern does not take goes to the kernel that was there
before; so does every call of these ops that rnnkern itself makes, for else it would go round in circles.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import _call, _fast, dispatch
from rnnkern._dynamo import left_to_python
from rnnkern.cells import CELLS

_CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
_TITLES = {"rnn_tanh": "RNNCell", "rnn_relu": "RNNCell", "gru": "GRUCell", "lstm": "LSTMCell"}
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PYTHON = torch._C.DispatchKey.PythonDispatcher
_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_included = torch._C._dispatch_tls_is_dispatch_key_included
_grad = torch.is_grad_enabled


class override:  # noqa: N801  a function to its callers, as torch.no_grad is
    """Run torch's recurrent networks on rnnkern, whoever calls them: the ops themselves are overridden.

    For code that cannot be edited: third-party models, subclasses of torch.nn.LSTM, functions and files of TorchScript.
    While it is on, ``rnn_tanh``, ``rnn_relu``, ``gru`` and ``lstm``, dense and packed, and their four cells run on
    rnnkern under the same rules as rnnkern's modules, :class:`use_backend` included. What rnnkern does not take, and
    what automatic choice leaves to torch, runs on torch's kernels as if nothing had been overridden; so do calls inside
    :mod:`torch.func` transforms, tracers and dispatch modes, calls with tensor subclasses, and errors, which are
    torch's. Devices other than CPUs and CUDA's are not touched. A graph that torch.compile makes of these ops has
    torch's in it, but Dynamo leaves torch.nn's recurrent modules out of graphs, and those then run on rnnkern.
    Decompose exported programs outside of it: ``run_decompositions`` leaves these ops whole while it is on.

    For the whole process and all its threads, in ``with`` or between :meth:`enable` and :meth:`disable`. These are
    counted: the last one to go restores torch's dispatch tables. Turn it on and off while no other thread is inside
    one of these ops if you can; a call under way ends on the kernels with which it began.

    Example::

        >>> model = torch.jit.load("model.pt")
        >>> with rnnkern.override():
        ...     output = model(input)
    """

    def __enter__(self) -> override:
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @staticmethod
    def enable() -> None:
        """Turn it on until :meth:`disable` has been called as many times."""
        _switch.enable()

    @staticmethod
    def disable() -> None:
        """Take back one :meth:`enable`.

        Raises:
            RuntimeError: there is none.
        """
        _switch.disable()


class _Switch:
    """How many want the override, and what is registered while anybody does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.library: torch.library.Library | None = None
        self.sites: list[tuple[Any, str]] = []
        # A thread may have looked up a kernel and be waiting for the interpreter's lock to enter it when another
        # thread removes it. The handles keep it alive for some more removals, far longer than such a wait takes.
        self.removed: deque[list[Any]] = deque(maxlen=256)

    def enable(self) -> None:
        with self.lock:
            if self.count == 0:
                self._register()
            self.count += 1

    def disable(self) -> None:
        with self.lock:
            if self.count == 0:
                raise RuntimeError("override: disable() without an enable() before it")
            self.count -= 1
            if self.count == 0:
                self._remove()

    def _register(self) -> None:
        devices = ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",)
        keys = [f"{prefix}{device}" for prefix in ("", "Autograd") for device in devices]
        # All kernels before any is overridden: one at CPU changes which one AutogradCPU would take.
        kernels = []
        for op, make, cell in _ops():
            kernels += [(op, key, make(cell, _Torch(op, torch.library.get_kernel(op, key)))) for key in keys]
        self.library = torch.library.Library("aten", "IMPL")
        try:
            for op, key, kernel in kernels:
                # Where Dynamo has left a caller out of its graphs, it must not make one of what runs inside of its op.
                left_to_python(kernel)
                self.library.impl(op, kernel, key, with_keyset=True)
                self.sites.append((op, key))
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        assert self.library is not None
        self.removed.append([torch.library.get_kernel(op, key) for op, key in self.sites])
        self.library._destroy()
        for op, _ in self.sites:
            op._dispatch_cache.clear()  # where Python's dispatcher, that of tracers, keeps what it has looked up
        self.library, self.sites = None, []


def _ops() -> list[tuple[Any, Callable[..., Any], str]]:
    """(op, what makes its kernel, cell), for every op that is overridden."""
    aten = torch.ops.aten
    found: list[tuple[Any, Callable[..., Any], str]] = []
    for cell in _CELLS:
        packet = getattr(aten, cell)
        found.append((packet.input, _dense, cell))
        found.append((packet.data, _packed, cell))
        found.append((getattr(aten, f"{cell}_cell").default, _step, cell))
    return found


class _Torch(NamedTuple):
    """An op as torch runs it."""

    op: Any
    kernel: Any

    def __call__(self, keys: Any, *args: Any) -> Any:
        if _included(_PYTHON):  # a tracer, for which torch has decompositions in Python
            return self.op.decompose(*args)
        dispatch.ran("torch")
        return self.kernel.call_boxed(keys, *args)

    def instead(self, refused: Exception | None, keys: Any, *args: Any) -> Any:
        """After rnnkern raised `refused`: what is wrong with a call is torch's to say; if nothing is, a warning."""
        found = self(keys, *args)
        if refused is not None:
            warnings.warn(
                f"override: torch ran {self.op}, which rnnkern refused: {refused}", RuntimeWarning, stacklevel=2
            )
        return found


class _Thread(threading.local):
    inside = False  # of rnnkern, called by a kernel of this module


_thread = _Thread()


def _watched(*tensors: Tensor) -> bool:
    """Whether somebody follows torch's own ops here: rnnkern's would be nothing to them.

    In a transform of torch.func this runs at one level of several, where a custom function may not begin another.
    """
    return bool(_transforms() or _modes() or _included(_PYTHON) or not _PLAIN.issuperset(map(type, tensors)))


def _dense(cell: str, original: _Torch) -> Callable[..., Any]:
    two = cell == "lstm"

    def kernel(
        keys: Any, input: Tensor, hx: Any, params: list[Tensor], bias: bool, num_layers: int, dropout: float,
        training: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        states = tuple(hx) if two else (hx,)
        if not _grad() and not (training and dropout):
            short = _fast.sequence(cell, input, states, params, bias, num_layers, 1 + bidirectional, batch_first)
            if short is not None:
                return short[0], *short[1]
        options = (bias, num_layers, dropout, training, bidirectional, batch_first)
        refused = None
        if not _thread.inside and input.dim() == 3 and not _watched(input, *states, *params):
            T, B = (input.size(1), input.size(0)) if batch_first else (input.size(0), input.size(1))
            sizes = _sizes(cell, input, params, num_layers, bidirectional)
            if not dispatch.wants_torch(input.device, input.dtype, cell, B, False, T, sizes):
                found = _on_rnnkern(_call.run, cell, input, states, params, *options)
                if not isinstance(found, Exception):
                    return (found[0], *found[1])
                refused = found
        return original.instead(refused, keys, input, hx, params, *options)

    return kernel


def _sizes(
    cell: str, input: Tensor, params: list[Tensor], num_layers: int, bidirectional: bool
) -> dispatch.Sizes | None:
    """What only a choice on a GPU reads; None: elsewhere, and where torch is to say what is wrong with the weights."""
    if not input.is_cuda or len(params) < 2 or params[0].dim() != 2 or params[1].dim() != 2:
        return None
    H = params[0].size(0) // len(CELLS[cell].gates)
    return dispatch.Sizes(params[0].size(1), H, num_layers, 1 + bidirectional, params[1].size(1) != H)


def _packed(cell: str, original: _Torch) -> Callable[..., Any]:
    two = cell == "lstm"

    def kernel(
        keys: Any, data: Tensor, sizes: Tensor, hx: Any, params: list[Tensor], bias: bool, num_layers: int,
        dropout: float, training: bool, bidirectional: bool,
    ) -> Any:  # fmt: skip
        options = (bias, num_layers, dropout, training, bidirectional)
        states = tuple(hx) if two else (hx,)
        refused = None
        if not _thread.inside and sizes.dim() == 1 and not _watched(data, sizes, *states, *params):
            B = int(sizes[0]) if data.is_cuda and sizes.numel() else 0  # a choice on a CPU does not read it
            known = _sizes(cell, data, params, num_layers, bidirectional)
            if not dispatch.wants_torch(data.device, data.dtype, cell, B, True, sizes.size(0), known):
                found = _on_rnnkern(_call.run, cell, data, states, params, *options, False, sizes)
                if not isinstance(found, Exception):
                    return (found[0], *found[1])
                refused = found
        return original.instead(refused, keys, data, sizes, hx, params, *options)

    return kernel


def _step(cell: str, original: _Torch) -> Callable[..., Any]:
    two, title = cell == "lstm", _TITLES[cell]

    def kernel(
        keys: Any, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:  # fmt: skip
        states = tuple(hx) if two else (hx,)
        weights = (w_ih, w_hh, b_ih, b_hh)
        if not _grad():
            short = _fast.one_step(cell, input, states, weights)
            if short is not None:
                return short if two else short[0]
        given = (w for w in weights if w is not None)
        refused = None
        if not _thread.inside and input.dim() == 2 and not _watched(input, *states, *given):
            if not dispatch.wants_torch(input.device, input.dtype, f"{cell}_cell", input.size(0), False, 1):
                found = _on_rnnkern(_call.run_cell, cell, title, input, states, *weights)
                if not isinstance(found, Exception):
                    return found if two else found[0]
                refused = found
        return original.instead(refused, keys, input, hx, *weights)

    return kernel


def _on_rnnkern(run: Callable[..., Any], *args: Any) -> Any:
    """What rnnkern makes of a call, or the error with which it refuses it."""
    _thread.inside = True
    try:
        return run(*args)
    except (IndexError, RuntimeError, ValueError) as error:
        if dispatch.requested() is not None:
            raise  # a backend that was asked for by name is never swapped for another
        return error
    finally:
        _thread.inside = False


left_to_python(_Switch.enable)
left_to_python(_Switch.disable)
_switch = _Switch()
