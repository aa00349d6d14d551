"""What only sLSTM has: exponentials that may not overflow, a state in three parts, units without a past, heads."""

from __future__ import annotations

import re

import pytest
import torch
from stacks import D, flat, gradients
from tolerance import check, check_grad
from torch import Tensor
from written_out import loop

import rnnkern
from rnnkern import _recompute

T, B, I, H = 6, 3, 4, 6


def make(**kwargs: object) -> rnnkern.SLSTM:
    return rnnkern.SLSTM(I, H, **({"num_heads": 2, "dtype": D} | kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_large_inputs_do_not_overflow(dtype: torch.dtype, backend: str) -> None:
    module = make(dtype=dtype, bidirectional=True)
    x = (torch.randn(T, B, I, dtype=D) * 1e4).to(dtype).requires_grad_()
    with rnnkern.use_backend(backend):
        y, final, states = module(x, return_states=True)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
    assert all(v.isfinite().all() for v in (y, *final, *states[0], *grads))
    assert y.abs().max() <= 1 and states[0][2].min() >= 1


@pytest.mark.parametrize("gate", [-1e4, -300.0, 300.0, 1e4])
def test_a_unit_without_a_past_begins(gate: float, backend: str) -> None:
    """The input gate alone says how much of nothing is kept: h is o z, where the formulas would have 0 / 0."""
    module, x = make(), torch.randn(1, B, I, dtype=D)
    with torch.no_grad():
        module.bias_ih_l0.chunk(4, 1)[0].fill_(gate)
    zeros = torch.zeros(1, B, H, dtype=D)
    with rnnkern.use_backend(backend):
        y, (_, c, n, m) = module(x)
        for hx in ((zeros,) * 4, (zeros, zeros + 2, zeros, zeros - 700)):
            assert torch.equal(module(x, hx)[0], y)
    _, truth = loop("SLSTM", module, x, (zeros,) * 4)
    check([y[0], c, n, m], [truth[0][0], *truth[1:]], [truth[0][0], *truth[1:]])
    assert n.eq(1).all()


def test_states_of_one_value_in_other_scales_are_one(backend: str) -> None:
    module, x = make(), torch.randn(T, B, I, dtype=D)
    h, c, m = torch.randn(3, 1, B, H, dtype=D).unbind(0)
    n, by = torch.rand(1, B, H, dtype=D) + 0.5, 3.0
    factor = torch.tensor(-by, dtype=D).exp()
    with rnnkern.use_backend(backend):
        y, (_, c_n, n_n, m_n) = module(x, (h, c, n, m))
        other, (_, c_o, n_o, m_o) = module(x, (h, c * factor, n * factor, m + by))
    check([other, c_o / n_o, n_o.log() + m_o], [y, c_n / n_n, n_n.log() + m_n], [y, c_n / n_n, n_n.log() + m_n])


def test_nan_goes_through(backend: str) -> None:
    module, x = make(num_heads=1), torch.randn(T, B, I, dtype=D)
    clean = module(x)[0]
    x[2, 1, 0] = float("nan")
    with rnnkern.use_backend(backend):
        y, final = module(x)
    assert y[2:, 1].isnan().all() and all(v[:, 1].isnan().all() for v in final)
    check(y[:, [0, 2]], clean[:, [0, 2]], clean[:, [0, 2]])
    check(y[:2], clean[:2], clean[:2])


def test_less_memory_with_heads_and_directions(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "SMALLEST", 1)  # several segments
    module, x = make(bidirectional=True, num_layers=2), torch.randn(T, B, I, dtype=D, requires_grad=True)
    wrt, found = [x, *module.parameters()], []
    for module.memory in ("save", "recompute"):
        with rnnkern.use_backend(backend):
            out = flat(module(x, return_states=True))
        found.append((out, gradients(out, wrt)))
    (truth, exact), (ours, grads) = found
    check(ours, truth, truth)
    check_grad(grads, exact, exact)


def test_ensembles_of_weights_with_heads() -> None:
    modules, x = [make(bidirectional=True) for _ in range(2)], torch.randn(T, B, I, dtype=D)
    params, _ = torch.func.stack_module_state(modules)
    ours = torch.func.vmap(lambda p: torch.func.functional_call(modules[0], p, (x,)))(params)
    truth = [torch.stack(v) for v in zip(*(flat(module(x)) for module in modules), strict=True)]
    check(flat(ours), truth, truth)


def test_heads_see_themselves_alone() -> None:
    module, x = make(bias=False), torch.randn(T, B, I, dtype=D)
    before = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0[1] += 1
    after = module(x)[0]
    assert torch.equal(before[..., : H // 2], after[..., : H // 2]) and not torch.equal(before, after)
    one, whole = make(num_heads=1, bias=False), torch.zeros(4, H, H, dtype=D)
    with torch.no_grad():
        w_ih, w_hh = (w.unflatten(1, (4, -1)).transpose(0, 1) for w in (module.weight_ih_l0, module.weight_hh_l0))
        for k in range(2):
            own = slice(k * H // 2, (k + 1) * H // 2)
            whole[:, own, own] = w_hh[:, k]
        one.weight_ih_l0.copy_(w_ih.flatten(0, 2).unsqueeze(0))
        one.weight_hh_l0.copy_(whole.flatten(0, 1).unsqueeze(0))
    check(one(x)[0], after, after)


def test_forget_gates_begin_nearly_open() -> None:
    module = make(num_layers=2, num_heads=3)
    for layer in range(2):
        bias: Tensor = getattr(module, f"bias_ih_l{layer}")
        assert torch.equal(bias[:, H // 3 : 2 * H // 3], torch.tensor([[3.0, 6.0]] * 3, dtype=D))
        assert bias[:, : H // 3].abs().max() <= H**-0.5


@pytest.mark.parametrize("heads", [0, 4, -1, 1.0, True, "2"])
def test_heads_that_do_not_divide_are_refused(heads: object) -> None:
    with pytest.raises(ValueError, match=f"num_heads: expected a divisor of hidden_size 6, got {heads!r}"):
        make(num_heads=heads)


@pytest.mark.parametrize(
    "option, words",
    [
        ({"zoneout": 0.1}, "zoneout: SLSTM's c, n and m are one value"),
        ({"cell_clip": 1.0}, "cell_clip: SLSTM has no cell state to bound"),
        ({"layer_norm": True}, "layer_norm: SLSTM normalises its state"),
        ({"peephole": True}, "peephole: SLSTM has no peepholes"),
        ({"proj_clip": 1.0}, "proj_clip: there is no projection"),
    ],
)
def test_options_that_make_no_sense_are_refused(option: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**option)
    module = make()
    with pytest.raises(ValueError, match=words):
        rnnkern.functional.slstm(torch.randn(T, B, I, dtype=D), None, list(module.parameters()), **option)


def test_states_and_weights_that_do_not_fit_are_refused() -> None:
    module, x = make(), torch.randn(T, B, I, dtype=D)
    zeros = torch.zeros(1, B, H, dtype=D)
    for hx, words in (
        (zeros, "hx: expected the four states (h, c, n, m), got a Tensor"),
        ((zeros, zeros), "hx: expected the four states (h, c, n, m), got a tuple of 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            module(x, hx)
        with pytest.raises(ValueError, match=re.escape(words)):
            rnnkern.functional.slstm(x, hx, module._weights())
    with pytest.raises(RuntimeError, match=re.escape("Expected hidden[3] size (1, 3, 6), got [1, 3, 5]")):
        module(x, (zeros, zeros, zeros, zeros[..., 1:]))
    with pytest.raises(RuntimeError, match=re.escape("all states should also be 3-D but got (3-D, 2-D, 3-D, 3-D)")):
        module(x, (zeros, zeros[0], zeros, zeros))
    with pytest.raises(ValueError, match="reset_state: expected the four states"):
        module(x, reset=torch.zeros(T, B, dtype=torch.bool), reset_state=(zeros, zeros))
    weights = module._weights()
    for at, bad, words in (
        (0, weights[0][0], "expected (num_heads, 4*hidden_size/num_heads, features) tensors"),
        (1, weights[1][..., 1:], "weight_hh_l0: expected shape [2, 12, 3], got [2, 12, 2]"),
        (2, weights[2][:1], "bias_ih_l0: expected shape [2, 12], got [1, 12]"),
    ):
        wrong = [*weights]
        wrong[at] = bad
        with pytest.raises(RuntimeError, match=re.escape(words)):
            rnnkern.functional.slstm(x, None, wrong)
    with pytest.raises(RuntimeError, match="incorrect number of RNN parameters"):
        rnnkern.functional.slstm(x, None, [])


def test_functions_take_what_modules_hold() -> None:
    module = make(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=D)
    theirs = flat(module(x, return_states=True))
    ours = rnnkern.functional.slstm(x, None, module._weights(), num_layers=2, bidirectional=True, return_states=True)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), theirs, strict=True))
    assert [v.shape for v in ours[2][0]] == [(T, B, 2 * H)] * 4
