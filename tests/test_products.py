"""The extension's products of matrices, which a backward takes in place of torch's where those are slow."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from isas import instruction_sets
from stacks import KINDS, flat, gradients, pair
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.functional import linear

from rnnkern import _products, dispatch

NATIVE = dispatch.unavailable("cpp") is None
SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (17, 64, 16),
    (64, 64, 3400),
    (97, 65, 513),
    (200, 8, 1025),
    (1024, 72, 600),
    (5, 300, 90),
]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of the extension, whatever the maker of the processor; all that have any have those of AVX-512."""
    if "avx512" not in [p.id for p in instruction_sets() if not p.marks]:
        pytest.skip("this machine lacks AVX-512, or the extension")
    monkeypatch.setattr(_products, "_found", "avx512")
    monkeypatch.setattr(_products, "_THREAD", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sides(M: int, N: int, K: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype)
    if layout == "turned":
        return a.t().contiguous().t(), b
    if layout == "columns":  # as one direction's of two
        return torch.stack((a, a), 1)[:, 1], torch.stack((b, b), 1)[:, 0]
    return (a, b) if layout == "plain" else (torch.stack((a.t(), a.t()), 1)[:, 1].t(), b.t().contiguous().t())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["plain", "turned", "columns", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_torchs(ours: None, dtype: torch.dtype, layout: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for M, N, K in SIZES:
        a, b = sides(M, N, K, dtype, layout)
        start = torch.randn(M, 2 * N, dtype=dtype)
        truth, there = a.double() @ b.double(), start.double()
        check(_products.mm(a, b), a @ b, truth, f"{M} {N} {K}")
        total = start.clone()
        assert _products.mm(a, b, total[:, N:]).data_ptr() == total[:, N:].data_ptr()
        check(total[:, N:], torch.addmm(start[:, N:], a, b), truth + there[:, N:], f"{M} {N} {K} added")
        assert torch.equal(total[:, :N], start[:, :N])
        assert torch.equal(_products.mm(a, b), _products.mm(a, b))


def test_nan_stays_in_its_rows_and_columns(ours: None) -> None:
    a, b = torch.randn(600, 20), torch.randn(600, 30)
    a[3, 5], b[7, 11] = float("nan"), float("inf")
    expected = (a.double().t() @ b.double()).float()
    found = _products.mm(a.t(), b)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("size", ["M", "N", "K"])
def test_nothing(ours: None, size: str) -> None:
    M, N, K = (0 if name == size else 4 for name in "MNK")
    assert torch.equal(_products.mm(torch.ones(M, K), torch.ones(K, N)), torch.zeros(M, N))
    total = torch.ones(M, N)
    assert torch.equal(_products.mm(torch.ones(M, K), torch.ones(K, N), total), torch.ones(M, N))


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_layers(ours: None, kind: str, dtype: torch.dtype, memory: str) -> None:
    made = pair(kind, 10, 40, num_layers=2, bidirectional=True, backend=None, dtype=dtype)
    made.ours.memory = memory
    truth, x = copy.deepcopy(made.theirs).double(), torch.randn(30, 6, 10, dtype=dtype)
    results = []
    for module in (made.ours, made.theirs, truth):
        leaf = x.to(next(module.parameters()).dtype).requires_grad_()
        outputs = flat(module(leaf))
        results.append((outputs, gradients(outputs, [leaf, *module.parameters()])))
    (y, grads), (theirs, their_grads), (true, true_grads) = results
    check(y, theirs, true, kind)
    check_grad(grads, their_grads, true_grads, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear(ours: None, dtype: torch.dtype) -> None:
    """Derivatives of both orders; batched ones, autocast and transforms are torch's."""
    x, w = torch.randn(70, 20, dtype=dtype), torch.randn(40, 20, dtype=dtype)
    d, e = torch.randn(70, 40, dtype=dtype), torch.randn(70, 20, dtype=dtype)
    results = []
    for run, convert in ((_products.linear, dtype), (linear, dtype), (linear, torch.float64)):
        leaves = [v.to(convert).requires_grad_() for v in (x, w, d)]
        y = run(*leaves[:2])
        first = torch.autograd.grad((y * y).sum() / 2, leaves[:2], create_graph=True)
        second = torch.autograd.grad((first[0] * e.to(convert)).sum(), leaves[:2], retain_graph=True)
        along = torch.autograd.grad(y, leaves[:2], torch.stack([leaves[2], y]).detach(), is_grads_batched=True)
        results.append([y, *first, *second, *along])
    check(results[0], results[1], results[2], "linear")
    assert type(_products.linear(x.requires_grad_(), w).grad_fn).__name__ == "_LinearBackward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _products.linear(x.float(), w.float()).dtype == torch.bfloat16
    assert torch.equal(torch.func.vmap(_products.linear, (0, None))(x.unsqueeze(1), w)[:, 0], linear(x, w))


def test_what_does_not_fit_is_torchs_error(ours: None) -> None:
    for a, b in ((torch.ones(2, 3), torch.ones(4, 5)), (torch.ones(2, 3), torch.ones(3, 5).double())):
        for total in (None, torch.ones(2, 5)):
            with pytest.raises(RuntimeError):
                _products.mm(a, b, total)


@pytest.mark.skipif(not NATIVE, reason="the extension was not built")
def test_what_has_none_says_so() -> None:
    from rnnkern import _cpu

    assert not _cpu.gemm_pays("baseline")
    with pytest.raises(ValueError, match="no products of matrices with baseline"):
        _cpu.gemm("baseline", 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, False, 1)
