"""Who is measured: rnnkern and its peers, each a `Side` that runs one case on the same weights and inputs.

`has` says which cases a peer has; one that is missing raises `Unavailable` with the reason.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.cases import DTYPES, Case, module_name
from benchmarks.onnx_graph import feed, from_onnx, onnx_model
from benchmarks.problem import Problem, Side, Unavailable, build, imported, module_side, side_of


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
    """Which of torch's own recurrent kernels a call runs, by the profiler: "oneDNN", "cuDNN" with the name of its
    kernel (which tells the algorithm that torch picked), "ATen" or "" (none)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _silent_stderr(), torch.profiler.profile(activities=activities) as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    averages = profile.key_averages()
    events = {event.key for event in averages}
    if "aten::_cudnn_rnn" in events:
        return cudnn_algorithm([event.key for event in averages if event.device_time_total])
    if "aten::mkldnn_rnn_layer" in events:
        return "oneDNN"
    own = ("rnn_tanh", "rnn_relu", "gru", "lstm")
    return "ATen" if events & {f"aten::{name}{end}" for name in own for end in ("", "_cell")} else ""


def cudnn_algorithm(kernels: list[str]) -> str:
    """The algorithm by its kernels' names: persistent ones say so, STANDARD's steps are GEMMs and element-wise."""
    persistent = [name for name in kernels if "persist" in name.lower()]
    return f"cuDNN PERSIST ({persistent[0][:60]})" if persistent else "cuDNN STANDARD"


def captured(side: Side, case: Case) -> Side:
    """The side replayed from a CUDA graph, where the case asks for one."""
    if case.capture != "graph":
        return side
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                side.call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = side.call()
    except RuntimeError as error:
        raise Unavailable(f"cannot be captured: {str(error).splitlines()[0]}") from error

    def replay(kept: Any = kept) -> None:  # the graph's outputs live as long as it does
        graph.replay()

    return replace(side, call=replay)


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


def ours_fp32(problem: Problem, threads: int) -> Side:
    """rnnkern in fp32 beside rnnkern in bf16: half the bytes must not cost more time."""
    import rnnkern

    return module_side("rnnkern-fp32", rnnkern, problem, torch.float32)


def ours_plain(problem: Problem, threads: int) -> Side:
    """The dense call with as many rows and without the option that the case is about: what that option costs."""
    import rnnkern

    case = replace(problem.case, shape=problem.case.shape.plain)
    return module_side("rnnkern-plain", rnnkern, Problem.of(case), DTYPES[case.dtype])


def onnxruntime(problem: Problem, threads: int) -> Side:
    """Inference in fp32: it offers no other recurrent layers on a CPU. It packs its weights when it loads them."""
    runtime, model = imported("onnxruntime"), onnx_model(problem)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = feed(problem)
    names = [output.name for output in session.get_outputs()]

    def results() -> dict[str, Tensor]:
        found = dict(zip(names, session.run(None, given), strict=True))
        return from_onnx(problem, {name: torch.from_numpy(value) for name, value in found.items()})

    return Side("onnxruntime", runtime.__version__, lambda: session.run(None, given), results)


def openvino(problem: Problem, threads: int) -> Side:
    """Inference; in bf16 cases with fp32 at its edges. It packs its weights when it loads them."""
    runtime, model = imported("openvino"), onnx_model(problem)
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


def compiled_module(problem: Problem, threads: int) -> Side:
    """torch.nn's module under torch.compile, allowed into the graph: its loop over time is unrolled."""
    dtype = DTYPES[problem.case.dtype]
    module = build(torch.nn, problem.case).to(problem.case.device, dtype)
    module.load_state_dict(problem.weights)
    with torch._dynamo.config.patch(allow_rnn=True):
        return _compiled("torch.compile", problem, module, torch.compile(module, dynamic=False))


class Loop(torch.nn.Module):
    """What a user writes where there is no fused layer: a Python loop over steps of a cell."""

    def __init__(self, step: torch.nn.Module, two: bool) -> None:
        super().__init__()
        self.step, self.two = step, two

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        h = x.new_zeros(x.size(1), self.step.hidden_size)
        state: Any = (h, h) if self.two else h
        steps = []
        for row in x.unbind(0):
            state = self.step(row, state)
            steps.append(state[0] if self.two else state)
        final = tuple(s.unsqueeze(0) for s in state) if self.two else state.unsqueeze(0)
        return torch.stack(steps), final

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Under the layer's names, for whoever compares gradients."""
        for name, value in self.step.named_parameters():
            yield f"{name}_l0", value


def compiled_loop(problem: Problem, threads: int) -> Side:
    """torch.compile of a plain loop over torch.nn's cell."""
    case = problem.case
    cell = getattr(torch.nn, module_name(case.cell, "cell"))(case.shape.H, case.shape.H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in problem.weights.items()})
    loop = Loop(cell.to(case.device, DTYPES[case.dtype]), case.cell == "lstm")
    return _compiled("compiled-loop", problem, loop, torch.compile(loop, dynamic=False))


def _compiled(name: str, problem: Problem, module: torch.nn.Module, compiled: Any) -> Side:
    side = side_of(name, module, problem, DTYPES[problem.case.dtype], compiled)
    try:
        side.call()
    except Exception as error:  # its compiler fails in many ways, and none of them is ours
        raise Unavailable(f"does not compile: {type(error).__name__}: {str(error).splitlines()[0][:120]}") from error
    return side


PEERS: dict[str, Callable[[Problem, int], Side]] = {
    "torch.nn": torch_nn,
    "rnnkern-fp32": ours_fp32,
    "rnnkern-plain": ours_plain,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "torch.compile": compiled_module,
    "compiled-loop": compiled_loop,
    "torchrl": gpu_peers.torchrl,
    "flashrnn": gpu_peers.flashrnn,
    "haste": gpu_peers.haste,
}


def has(peer: str, case: Case) -> bool:
    """Whether the peer has such a case at all."""
    shape, inference = case.shape, case.mode == "inference"
    if peer == "onnxruntime":
        return inference and case.dtype == "fp32" and case.device == "cpu"
    if peer == "openvino":
        return inference and case.device == "cpu"
    if peer == "rnnkern-fp32":
        return case.dtype != "fp32"
    if peer == "rnnkern-plain":
        return shape != shape.plain
    if peer in ("torch.compile", "compiled-loop"):
        # A loop of more steps takes minutes to compile, and the ratio tells nothing new.
        plain = shape.layout == "dense" and shape.layers * shape.directions == 1
        small = shape.T <= 50 and (shape.H <= 128 or case.device == "cuda")
        return plain and small and case.dtype == "fp32" and not case.capture
    return peer == "torch.nn" or case.device == "cuda"
