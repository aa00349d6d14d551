"""Who is measured: rnnkern and its peers, each a `Side` that runs one case on the same weights and inputs.

A peer that has no such case gives None; one that is missing raises `Unavailable` with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.onnx_graph import feed, from_onnx, onnx_model
from benchmarks.problem import Problem, Side, Unavailable, module_side


def ours(problem: Problem) -> Side:
    """rnnkern's module, with the backend that `rnnkern.use_backend` has named or the library's own choice."""
    import rnnkern

    return module_side("rnnkern", rnnkern, problem, DTYPES[problem.case.dtype])


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler of some torch versions writes two lines of its own at every use, past Python's sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def torch_algorithm(call: Callable[[], Any]) -> str:
    """Which of torch's own recurrent kernels a call runs, by the profiler: "oneDNN", "ATen" or "" (none)."""
    with _silent_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = {event.key for event in profile.key_averages()}
    if "aten::mkldnn_rnn_layer" in events:
        return "oneDNN"
    own = ("rnn_tanh", "rnn_relu", "gru", "lstm")
    return "ATen" if events & {f"aten::{name}{end}" for name in own for end in ("", "_cell")} else ""


def backend_of(side: Side) -> str:
    """What rnnkern ran. Its own word is not taken for "not torch's kernels": the profiler looks for those."""
    from rnnkern import dispatch

    own = torch_algorithm(side.call)
    if own:
        return f"torch ({own})"
    dispatch.ran("direct")  # stays if the call goes past the choice, as a short cut for single steps may
    side.call()
    return dispatch.last() or "direct"


def torch_nn(problem: Problem, threads: int) -> Side:
    return module_side("torch.nn", torch.nn, problem, DTYPES[problem.case.dtype])


def ours_fp32(problem: Problem, threads: int) -> Side | None:
    """rnnkern in fp32 beside rnnkern in bf16: half the bytes must not cost more time."""
    if problem.case.dtype == "fp32":
        return None
    import rnnkern

    return module_side("rnnkern-fp32", rnnkern, problem, torch.float32)


def onnxruntime(problem: Problem, threads: int) -> Side | None:
    """Inference in fp32: it offers no other recurrent layers on a CPU. It packs its weights when it loads them."""
    if problem.case.mode != "inference" or problem.case.dtype != "fp32":
        return None
    runtime, model = _import("onnxruntime"), onnx_model(problem)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = feed(problem)
    names = [output.name for output in session.get_outputs()]

    def results() -> dict[str, Tensor]:
        found = dict(zip(names, session.run(None, given), strict=True))
        return from_onnx(problem, {name: torch.from_numpy(value) for name, value in found.items()})

    return Side("onnxruntime", runtime.__version__, lambda: session.run(None, given), results)


def openvino(problem: Problem, threads: int) -> Side | None:
    """Inference; in bf16 cases with fp32 at its edges. It packs its weights when it loads them."""
    if problem.case.mode != "inference":
        return None
    runtime, model = _import("openvino"), onnx_model(problem)
    precision = {"fp32": "f32", "bf16": "bf16"}[problem.case.dtype]
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    core = runtime.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", hints)
    request = compiled.create_infer_request()
    given = {name: runtime.Tensor(value) for name, value in feed(problem).items()}
    names = [output.any_name for output in compiled.outputs]

    def results() -> dict[str, Tensor]:
        request.infer(given)
        found = {name: torch.from_numpy(request.get_tensor(name).data.copy()) for name in names}
        return from_onnx(problem, found)

    return Side("openvino", runtime.__version__.split("-")[0], lambda: request.infer(given), results)


PEERS: dict[str, Callable[[Problem, int], Side | None]] = {
    "torch.nn": torch_nn,
    "rnnkern-fp32": ours_fp32,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed") from error
