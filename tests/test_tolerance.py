"""The tools that all other tests lean on: a rule that never fails would make every one of them green."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import scan_backends
from tolerance import check, check_grad

from rnnkern import dispatch


def test_exact_results_pass():
    truth = torch.randn(50, dtype=torch.float64)
    check(truth.float(), truth.float(), truth)
    check_grad([truth.float()], [truth.float()], [truth])
    check_grad(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    check(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2))


def test_error_beyond_the_yardstick_fails():
    truth = torch.randn(50, dtype=torch.float64)
    yardstick = truth + 1e-6
    check(truth + 3e-6, yardstick, truth)
    with pytest.raises(AssertionError, match=r"state\[0\]: error"):
        check(truth + 5e-6, yardstick, truth, "state")


def test_one_wrong_value_fails():
    truth = torch.randn(1000, dtype=torch.float64)
    ours = truth.clone()
    ours[17] += 1e-8
    with pytest.raises(AssertionError):
        check(ours, truth, truth)


def test_direction_of_a_gradient_counts():
    truth = torch.ones(10_000, dtype=torch.float64)
    yardstick = truth.clone()
    yardstick[0] += 1e-3
    ours = truth + 2e-3 * torch.randn(10_000, dtype=torch.float64).sign()
    check(ours, yardstick, truth)
    with pytest.raises(AssertionError, match="relative L2"):
        check_grad(ours, yardstick, truth)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    truth = torch.randn(5, dtype=torch.float64)
    ours = truth.clone()
    ours[2] = bad
    check(truth, ours, truth)  # a yardstick that overflows excuses nobody
    with pytest.raises(AssertionError):
        check(ours, truth, truth)
    check(ours, ours, ours)
    with pytest.raises(AssertionError, match="something else"):
        check(truth, ours, ours)


def test_shapes_and_counts_must_agree():
    one, row = torch.zeros(1), torch.zeros(1, 1)
    with pytest.raises(AssertionError, match="shapes"):
        check(one, one, row)
    with pytest.raises(AssertionError, match="as many"):
        check([one], [one], [one, one])


def test_uninitialised_memory_is_nan():
    like = torch.zeros(3, dtype=torch.bfloat16)
    for made in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
        assert made.isnan().all()
    assert np.isnan(np.empty(3)).all() and np.isnan(np.empty_like(np.zeros(3))).all()


def test_every_backend_is_listed():
    listed = scan_backends()
    assert [param.id for param in listed] == list(dispatch.ORDER)
    assert not next(param for param in listed if param.id == "reference").marks
