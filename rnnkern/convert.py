"""accelerate(model) and restore(model): torch.nn's recurrent modules in a model become rnnkern's, and back.

Only the class of a module changes. Parameters, buffers, hooks, optimizer references and names stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.utils import parametrize

from rnnkern import nn
from rnnkern._options import PLAIN, Extended
from rnnkern._stack import Beyond

log = logging.getLogger("rnnkern")

PAIRS = (
    (torch.nn.RNN, nn.RNN),
    (torch.nn.LSTM, nn.LSTM),
    (torch.nn.GRU, nn.GRU),
    (torch.nn.RNNCell, nn.RNNCell),
    (torch.nn.LSTMCell, nn.LSTMCell),
    (torch.nn.GRUCell, nn.GRUCell),
)


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    r"""Run a model's recurrent modules on rnnkern, in place, with the parameters that they have.

    Modules whose type is exactly one of torch.nn's RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell change their class;
    so do those with parametrizations (:mod:`torch.nn.utils.parametrize`, e.g. weight_norm), whose properties move to a
    new class. Everything else that is recurrent (other subclasses, quantized and scripted modules, modules with a
    `forward` of their own on the instance) is left as it is and named in the log ``"rnnkern"``;
    :func:`rnnkern.convert.left` lists it.

    Args:
        model: any module; the recurrent ones may be anywhere in it, or be it.

    Returns:
        The same model.

    Example::

        >>> model = rnnkern.accelerate(model)
        >>> optimizer = torch.optim.Adam(model.parameters())
    """
    done = 0
    for module in model.modules():
        if _reason(module) is None:
            for theirs, ours in PAIRS:
                done += _swap(module, theirs, ours)
    for name, reason in left(model).items():
        log.warning("accelerate: %s left as it is: %s", name or "the model itself", reason)
    log.info("accelerate: %d modules run on rnnkern", done)
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    r"""Undo :func:`accelerate`: rnnkern's modules become torch.nn's again, with the parameters that they have.

    Args:
        model: any module.

    Returns:
        The same model.

    Raises:
        ValueError: modules that torch.nn has no class for; the message names them, and nothing has been changed.

    Example::

        >>> torch.save(rnnkern.restore(model), "model.pt")
    """
    lacking = {name: reason for name, module in model.named_modules() if (reason := _beyond_torch(module))}
    if lacking:
        named = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in lacking.items())
        raise ValueError(f"restore: torch.nn has nothing like these modules: {named}")
    done = 0
    for module in model.modules():
        for theirs, ours in PAIRS:
            done += _swap(module, ours, theirs)
    log.info("restore: %d modules run on torch", done)
    return model


def left(model: torch.nn.Module) -> dict[str, str]:
    """Names of the recurrent modules that :func:`rnnkern.accelerate` leaves as they are, and why."""
    return {name: reason for name, module in model.named_modules() if (reason := _reason(module))}


def _reason(module: torch.nn.Module) -> str | None:
    """Why a recurrent module cannot change its class; None if it can, or is rnnkern's already, or is not recurrent."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return f"a TorchScript {original}" if original in {theirs.__name__ for theirs, _ in PAIRS} else None
    recurrent = isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)) or _quantized(kind)
    if not recurrent or any(issubclass(kind, ours) for _, ours in PAIRS):
        return None
    if "forward" in vars(module):
        return "it has a forward of its own on the instance"
    base = parametrize.type_before_parametrizations(module)
    if base not in {theirs for theirs, _ in PAIRS}:
        return f"{kind.__module__}.{kind.__qualname__} is not exactly one of torch.nn's classes"
    if base is not kind and kind.__mro__[1] is not base:
        return f"{kind.__qualname__} is not the class that torch's parametrizations make"
    return None


def _quantized(kind: type) -> bool:
    names = {theirs.__name__ for theirs, _ in PAIRS} | {"RNNBase", "RNNCellBase"}
    return "quantized" in kind.__module__ and any(base.__name__ in names for base in kind.__mro__)


def _swap(module: torch.nn.Module, old: type, new: type) -> bool:
    """Change a module's class from `old` to `new`, parametrized or not; whether it was of that class."""
    kind = type(module)
    if kind is old:
        module.__class__ = new
        return True
    if not parametrize.is_parametrized(module) or parametrize.type_before_parametrizations(module) is not old:
        return False
    # The parametrized tensors are properties of a class that was made for this one module; a plain swap would leave
    # them behind, and the module would compute with weights that nobody trains.
    body: dict[str, Any] = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    module.__class__ = type(f"Parametrized{new.__name__}", (new,), body)
    return True


def _beyond_torch(module: torch.nn.Module) -> str | None:
    """What in one of our modules torch.nn lacks; None if nothing, or if the module is not ours."""
    if isinstance(module, Beyond):
        return f"torch.nn has no {type(module).__name__}"
    if isinstance(module, Extended):
        memory = "" if module.memory == "save" else f", memory={module.memory!r}"
        if memory or module.options != PLAIN:
            return (memory + str(module.options)).removeprefix(", ")
    for _, ours in PAIRS:
        if isinstance(module, ours) and parametrize.type_before_parametrizations(module) is not ours:
            return f"{type(module).__qualname__} is a subclass of rnnkern.{ours.__name__}"
    return None
