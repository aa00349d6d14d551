"""torch's switches and ways of making modules, threads, torch's own module inputs, and forked processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS, D, flat, gradients, pair
from tolerance import check, check_grad
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import rnnkern
from rnnkern import dispatch
from rnnkern.convert import PAIRS

NAMES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]
everything = pytest.mark.parametrize("kind", [*KINDS, *CELLS])
X = torch.randn(4, 2, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def sample_of(kind: str) -> Tensor:
    return X[0] if "Cell" in kind else X


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_torch_s_own_module_inputs(name: str, training: bool) -> None:
    """Every case that PyTorch tests its own modules with, results and gradients; and its errors."""
    flag = "__allow_nonbracketed_mutation_flag"  # which PyTorch's test library clears
    allowed = getattr(torch.backends, flag)
    library = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
    setattr(torch.backends, flag, allowed)
    theirs = getattr(nn, name)
    infos = [info for info in library.module_db if info.module_cls is theirs]
    assert infos
    seen = 0
    for info in infos:
        packed = [{}, {"with_packed_sequence": True}] if "Cell" not in name else [{}]
        for extra in packed:
            for case in info.module_inputs_func(info, "cpu", D, True, training, **extra):
                make, run = case.constructor_input, case.forward_input
                a = theirs(*make.args, **make.kwargs).double().train(training)
                b = dict(PAIRS)[theirs](*make.args, **make.kwargs).double().train(training)
                b.load_state_dict(a.state_dict())
                results = []
                for module in (a, b):
                    torch.manual_seed(1)
                    out = flat(module(*run.args, **run.kwargs))
                    results.append([*out, *gradients(out, list(module.parameters()))])
                check_grad(results[1], results[0], results[0], f"{name} {case.desc}")
                seen += 1
        for case in (
            info.module_error_inputs_func(info, "cpu", D, True, training) if info.module_error_inputs_func else ()
        ):
            make, run = case.module_error_input.constructor_input, case.module_error_input.forward_input
            with pytest.raises(case.error_type, match=case.error_regex):
                dict(PAIRS)[theirs](*make.args, **make.kwargs).double()(*run.args, **run.kwargs)
    assert seen


@everything
def test_deterministic_algorithms(kind: str) -> None:
    """Nothing of ours is refused by torch's switch, and memory that it fills is not read."""
    module, x = pair(kind, 3, 5).ours, sample_of(kind).clone().requires_grad_()
    options = [{}] if "Cell" in kind else [{}, {"lengths": [4, 2]}, {"reset": torch.rand(4, 2) < 0.3}]
    for given in options:
        expected = flat(module(x, **given))
        torch.use_deterministic_algorithms(True)
        try:
            found = flat(module(x, **given))
            wrt = [x, *module.parameters()]
            for a, b in zip(gradients(found, wrt), gradients(found, wrt), strict=True):
                assert torch.equal(a, b)
        finally:
            torch.use_deterministic_algorithms(False)
        check(found, expected, expected, str(given))


@everything
def test_matmul_precision(kind: str) -> None:
    """On a CPU it changes nothing: sums are in float32 whatever it says."""
    module, x = pair(kind, 3, 5, dtype=torch.float32).ours, sample_of(kind).float()
    before, results = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            results.append(flat(module(x)))
    finally:
        torch.set_float32_matmul_precision(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_number_of_threads_changes_between_calls(kind: str, threads: None) -> None:
    both = pair(kind, 64, 64, 2, bidirectional=True, backend=None)
    x = torch.randn(10, 16, 64, dtype=D, requires_grad=True)
    for count in (2, 1, 4, 1, 3):
        torch.set_num_threads(count)
        both.compare(x, None, [x], f"{count} threads")


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_one_module_from_eight_threads(kind: str) -> None:
    module = pair(kind, 32, 64, 2).ours
    inputs = [torch.randn(20, 4, 32, dtype=D) for _ in range(8)]
    weights = list(module.parameters())

    def results(x: Tensor) -> list[Tensor]:
        out = flat(module(x))
        with torch.no_grad():
            quiet = flat(module(x))
        return [*out, *quiet, *gradients(out, weights)]

    expected, wrong = [results(x) for x in inputs], []

    def work(i: int) -> None:
        for _ in range(5):
            try:
                check_grad(results(inputs[i]), expected[i], expected[i], f"thread {i}")
            except BaseException as error:
                wrong.append(error)
                raise

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@everything
def test_meta_and_deferred_initialisation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torch.device("meta") knows torch.empty, not what conftest.py has put in its place
    name, options = kind.split()[0], {**KINDS, **CELLS}[kind]
    with torch.device("meta"):
        module = getattr(rnnkern, name)(3, 5, dtype=D, **options)
    assert all(p.is_meta for p in module.parameters())
    x = sample_of(kind)
    out = flat(module(x.to("meta").requires_grad_()))
    assert all(o.is_meta for o in out)
    sum(o.sum() for o in out).backward()
    assert all(p.grad.is_meta for p in module.parameters())
    theirs = pair(kind, 3, 5).theirs
    expected = flat(theirs(x))
    module.load_state_dict(theirs.state_dict(), assign=True)
    check(flat(module(x)), expected, expected, "assigned")
    module = getattr(rnnkern, name)(3, 5, dtype=D, device="meta", **options).to_empty(device="cpu")
    module.reset_parameters()
    assert all(o.isfinite().all() for o in flat(module(x)))
    if "Cell" in kind:  # torch's skip_init refuses torch.nn.LSTM and its like too
        skipped = nn.utils.skip_init(getattr(rnnkern, name), 3, 5, dtype=D, **options)
        skipped.load_state_dict(theirs.state_dict())
        check(flat(skipped(x)), expected, expected, "skip_init")


@everything
def test_inference_mode(kind: str) -> None:
    both, x = pair(kind, 3, 5, backend=None), sample_of(kind)
    expected = flat(both.theirs(x))
    with torch.inference_mode():
        found = flat(both.run_ours(x))
        assert all(o.is_inference() for o in found)
    check(found, expected, expected, "inference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_grad_scaler(kind: str, dtype: torch.dtype) -> None:
    """Scaled gradients, taken back: those of the same loss without it; and infinities are seen and skipped."""
    module, x = pair(kind, 3, 5, dtype=torch.float32).ours, X.float()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(module.parameters(), 0.1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return module(x)[0].float().square().mean()

    expected = torch.autograd.grad(loss(), list(module.parameters()))
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for p, g in zip(module.parameters(), expected, strict=True):
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), g.flatten(), 0) > 0.99
    before = [p.detach().clone() for p in module.parameters()]
    module.weight_hh_l0.grad[0, 0] = float("inf")
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@everything
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    module, x = pair(kind, 3, 5).ours, sample_of(kind).clone().requires_grad_()
    results = []
    plain = lambda x: tuple(flat(module(x)))  # noqa: E731  the reentrant kind sees no gradients of nested tuples
    for run in (plain, lambda x: checkpoint(plain, x, use_reentrant=reentrant)):
        module.zero_grad()
        x.grad = None
        out = flat(run(x))
        sum(o.square().sum() for o in out).backward()
        results.append([*out, x.grad, *(p.grad.clone() for p in module.parameters())])
    check_grad(results[1], results[0], results[0], kind)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_run_torch_s_kernels(device: str) -> None:
    """What those lack (lengths=, transforms, graphs) is for the reference, whose ops take any device."""
    for cell in ("gru", "lstm", "rnn_tanh", "gru_cell"):
        assert dispatch.wants_torch(torch.device(device), torch.float32, cell, 4, False, 10)
    key = {"mps": "MPS", "xpu": "XPU", "meta": "Meta"}[device]
    for op in ("scan_forward", "layer_forward", "scan_backward", "inference"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"rnnkern::{op}", key)


@everything
def test_ensembles_and_per_sample_gradients(kind: str) -> None:
    """functional_call and stack_module_state, vmapped over inputs, states, weights and all of them, with gradients."""
    models, cell, two = [pair(kind, 3, 5).ours for _ in range(3)], "Cell" in kind, kind.startswith("LSTM")
    rows, P = ((2,) if cell else (1, 2)), 2 if "proj" in kind else 5
    xs = torch.randn(3, *sample_of(kind).shape, dtype=D)
    states = [torch.randn(3, *rows, width, dtype=D) for width in ((P, 5) if two else (P,))]
    stacked, _ = stack_module_state(models)
    weights = {name: p.detach() for name, p in stacked.items()}

    def loss(weights: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> Tensor:
        hx = tuple(states) if two else states[0]
        return sum(o.square().sum() for o in flat(functional_call(models[0], weights, (x, hx))))

    for which in ({"w"}, {"x"}, {"h"}, {"w", "x", "h"}):
        dims = tuple(0 if name in which else None for name in "wxh")
        given = [v if d == 0 else _first(v) for v, d in zip((weights, xs, states), dims, strict=True)]
        found = vmap(grad(loss, (0, 1, 2)), dims)(*given)
        each = []
        for i in range(3):
            own = [_first(v, i) if d == 0 else _first(v) for v, d in zip((weights, xs, states), dims, strict=True)]
            leaves = [t.clone().requires_grad_() for t in (*own[0].values(), own[1], *own[2])]
            again = dict(zip(weights, leaves, strict=False))
            total = loss(again, leaves[len(again)], leaves[len(again) + 1 :])
            each.append(torch.autograd.grad(total, leaves))
        expected = [torch.stack(column) for column in zip(*each, strict=True)]
        check_grad([*found[0].values(), found[1], *found[2]], expected, expected, str(which))


def _first(v: Any, i: int = 0) -> Any:
    return (
        {k: t[i] for k, t in v.items()} if isinstance(v, dict) else [t[i] for t in v] if isinstance(v, list) else v[i]
    )


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_randomness_of_dropout_under_vmap(kind: str) -> None:
    module = getattr(rnnkern, kind)(3, 5, 2, dropout=0.5, dtype=D)
    xs = X.expand(6, *X.shape)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(xs)
    for mode in ("same", "different"):
        out = vmap(lambda x: module(x)[0], randomness=mode)(xs)
        assert all(torch.equal(out[0], other) == (mode == "same") for other in out[1:])


def test_vmap_without_a_gradient_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backward would read is not written where none can come, and is where one can."""
    module, saved = rnnkern.GRU(3, 5, dtype=D), []
    backend = dispatch.backend("reference")
    forward = type(backend).forward
    monkeypatch.setattr(type(backend), "forward", lambda s, i: (saved.append(i.spec.save), forward(s, i))[1])
    xs = torch.randn(6, *X.shape, dtype=D)
    with rnnkern.use_backend("reference"):
        with torch.no_grad():
            quiet = vmap(lambda x: module(x)[0])(xs)
        loud = vmap(lambda x: module(x)[0])(xs)
        vmap(grad(lambda x: module(x)[0].sum()))(xs)
    assert saved[:3] == ["none", "all", "all"]
    check([quiet], [loud], [loud], "vmap")


class Encoded(Dataset):
    """Runs a module in the process that loads the data."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        x = torch.full((20, 8, 32), float(i))
        with torch.no_grad():
            packed = self.module(pack_padded_sequence(x, [20] * 4 + [3] * 4))[0].data.sum()
            return self.module(x)[0].sum() + packed


@pytest.mark.timeout(120)
def test_workers_forked_after_kernels_have_run(backend: str) -> None:
    module = rnnkern.GRU(32, 32, 2, bidirectional=True)
    with rnnkern.use_backend(backend):
        module(torch.randn(50, 16, 32))[0].sum().backward()
        data = Encoded(module)
        found = torch.cat(list(DataLoader(data, num_workers=2, timeout=60, multiprocessing_context="fork")))
        expected = torch.stack([data[i] for i in range(len(data))])
        assert torch.allclose(found, expected, rtol=1e-4)  # sums of 10,000 numbers, on other numbers of threads
        module(torch.randn(50, 16, 32))[0].sum().backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_with_one_thread(threads: None) -> None:
    """What torch asks of forked processes too, and DataLoader does: with more threads, OpenMP waits for lost ones."""
    module, x = rnnkern.LSTM(64, 128), torch.randn(50, 32, 64)
    torch.set_num_threads(2)
    module(x)[0].sum().backward()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                module(x)
            module(x)[0].sum().backward()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)
