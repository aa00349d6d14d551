"""The options of regularised and richer cells as arguments: of modules and functions, good ones and bad ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from stacks import draw, flat
from test_regularised import OPTIONS, B, I, T, made, run
from tolerance import check

import rnnkern


@pytest.mark.parametrize("cls", [rnnkern.RNN, rnnkern.LSTM, rnnkern.GRU])
def test_parameters(cls: Any) -> None:
    torch.manual_seed(1)
    plain = cls(3, 5, 2, bidirectional=True)
    torch.manual_seed(1)
    m = cls(3, 5, 2, bidirectional=True, layer_norm=True, **({"peephole": True} if cls is rnnkern.LSTM else {}))
    extra = [n for n in m.state_dict() if n not in plain.state_dict()]
    kinds = [
        "ln_ih",
        "ln_hh",
        *(["peephole_i", "peephole_f", "peephole_o", "ln_c", "ln_c_bias"] if cls is rnnkern.LSTM else []),
    ]
    assert extra == [n + e for e in ("_l0", "_l0_reverse", "_l1", "_l1_reverse") for n in kinds]
    assert all(torch.equal(p, m.state_dict()[n]) for n, p in plain.state_dict().items())
    for _ in range(2):
        for name in extra:
            p = getattr(m, name)
            assert isinstance(p, torch.nn.Parameter)
            if name.startswith("peephole"):
                assert p.abs().max() <= 5**-0.5 and p.std() > 0
            else:
                assert p.eq(0.0 if "bias" in name else 1.0).all()
        with torch.no_grad():
            for p in m.parameters():
                p.fill_(9)
        m.reset_parameters()
    twin = cls(3, 5, 2, bidirectional=True, layer_norm=True, peephole=m.peephole)
    twin.load_state_dict(m.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(m.state_dict())


def test_attributes_repr_and_copies() -> None:
    m = rnnkern.LSTM(3, 5, zoneout=(0.1, 0.2), cell_clip=2.0, memory="recompute", layer_norm=True)
    assert repr(m) == "LSTM(3, 5, memory=recompute, zoneout=(0.1, 0.2), cell_clip=2.0, layer_norm=True)"
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert repr(twin) == repr(m) and twin.options == m.options
        check(flat(twin.eval()(torch.ones(2, 1, 3))), (t := flat(m.eval()(torch.ones(2, 1, 3)))), t)
    m.zoneout = 0.3
    assert m.zoneout == 0.3 and m.cell_clip == 2.0
    with pytest.raises(ValueError, match="zoneout: expected a probability"):
        m.zoneout = 2
    with pytest.raises(AttributeError, match="layer_norm: fixed when the module is made"):
        m.layer_norm = False
    plain = rnnkern.LSTM(3, 5, zoneout=0.0, peephole=False)
    assert vars(plain).keys() == vars(torch.nn.LSTM(3, 5)).keys() and repr(plain) == "LSTM(3, 5)"


def test_accelerate_and_restore() -> None:
    model = rnnkern.accelerate(torch.nn.Sequential(torch.nn.GRU(3, 5), torch.nn.GRU(5, 5)))
    model[0].recurrent_dropout = 0.5
    assert not torch.equal(model[0](torch.ones(4, 1, 3))[0], model[0](torch.ones(4, 1, 3))[0])
    with pytest.raises(ValueError, match="0: recurrent_dropout=0.5"):
        rnnkern.restore(model)
    assert type(model[1]) is rnnkern.GRU
    model[0].recurrent_dropout = 0.0
    assert type(rnnkern.restore(model)[0]) is torch.nn.GRU


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("cls", [rnnkern.RNN, rnnkern.LSTM, rnnkern.GRU])
def test_short_ways_are_not_taken(cls: Any, grad: bool) -> None:
    m = cls(3, 5, zoneout=0.4).eval()
    x = torch.randn(1, 2, 3)
    with torch.set_grad_enabled(grad):
        mixed = m(x)[0]
        m.zoneout = 0.0
        plain = m(x)[0]
        check(mixed, 0.6 * plain, 0.6 * plain)


def test_torchs_kernels_refuse_them_by_name() -> None:
    m = rnnkern.GRU(3, 5, zoneout=0.1, recurrent_dropout=0.1, grad_clip=1.0)
    with rnnkern.use_backend("torch"):
        with pytest.raises(RuntimeError, match="recurrent_dropout=, zoneout=, grad_clip="):
            m(torch.ones(4, 2, 3))
        with pytest.raises(RuntimeError, match="this call: zoneout=, grad_clip="):
            m.eval()(torch.ones(4, 2, 3))
        m.grad_clip = m.zoneout = 0.0
        m(torch.ones(4, 2, 3))  # in evaluation nothing is left


def test_weight_dropout_runs_on_plain_kernels() -> None:
    m = made("LSTM", weight_dropout=0.5)
    x = draw(T, B, I)
    truth = run(m, "reference", x)
    check(run(m, "torch", x), truth, truth)


def test_functional() -> None:
    m = made("LSTM proj", **OPTIONS["all"], proj_clip=0.4)
    x, weights = draw(T, B, I), m._weights()
    options = {**OPTIONS["all"], "proj_clip": 0.4}
    expected = run(m, None, x)  # type: ignore[arg-type]
    torch.manual_seed(5)
    found = rnnkern.functional.lstm(x, None, weights, num_layers=2, bidirectional=True, training=True, **options)
    check(flat(found), expected, expected)
    for name in ("gru", "rnn_tanh", "rnn_relu"):
        n = made({"gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN relu"}[name], layer_norm=True, zoneout=0.1).eval()
        expected = flat(n(x))
        function = getattr(rnnkern.functional, name)
        found = function(x, None, n._weights(), num_layers=2, bidirectional=True, layer_norm=True, zoneout=0.1)
        check(flat(found), expected, expected)
    with pytest.raises(RuntimeError, match=r"ln_hh_l0: expected shape \[20\], got \[5\]"):
        bad = [*weights[:6], weights[9], *weights[7:]]
        rnnkern.functional.lstm(x, None, bad, num_layers=2, bidirectional=True, layer_norm=True, peephole=True)
    with pytest.raises(ValueError, match="proj_clip: there is no projection"):
        rnnkern.functional.lstm(x, None, made("LSTM")._weights(), num_layers=2, bidirectional=True, proj_clip=0.1)


BAD = [
    ({"recurrent_dropout": 1.0}, "recurrent_dropout: expected a probability from 0 to below 1, got 1.0"),
    ({"recurrent_dropout": -0.1}, "got -0.1"),
    ({"recurrent_dropout": float("nan")}, "got nan"),
    ({"recurrent_dropout": True}, "got True"),
    ({"recurrent_dropout": "0.5"}, "got '0.5'"),
    ({"recurrent_dropout_mode": "row"}, "expected one of sequence, step, candidate, got 'row'"),
    ({"weight_dropout": 1}, "weight_dropout: expected a probability"),
    ({"zoneout": 1.5}, "zoneout: expected a probability"),
    ({"zoneout": (0.1, -0.1)}, "got -0.1"),
    ({"zoneout": (0.1,)}, r"zoneout: expected a probability or those of \(h, c\), got \(0.1,\)"),
    ({"cell_clip": -1.0}, "cell_clip: expected a bound above 0, or 0 for none, got -1.0"),
    ({"grad_clip": float("nan")}, "grad_clip: .* got nan"),
    ({"grad_clip": float("inf")}, "grad_clip: .* got inf"),
    ({"proj_clip": 1.0}, "proj_clip: there is no projection"),
    ({"layer_norm": 1}, "layer_norm: expected True or False, got 1"),
]
FOREIGN = [
    (rnnkern.GRU, {"peephole": True}, "peephole: GRU has no peepholes"),
    (rnnkern.RNN, {"recurrent_dropout_mode": "candidate"}, "RNN has no candidate"),
    (rnnkern.GRU, {"cell_clip": 1.0}, "cell_clip: GRU has no cell state"),
    (rnnkern.RNN, {"proj_clip": 1.0}, "proj_clip"),
    (rnnkern.GRU, {"zoneout": (0.1, 0.1)}, r"zoneout: GRU has one state, expected one probability, got \(0.1, 0.1\)"),
]


@pytest.mark.parametrize("cls, options, words", [*((rnnkern.LSTM, *bad) for bad in BAD), *FOREIGN])
def test_bad_values(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(3, 5, **options)
    function = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}[cls.__name__]
    with pytest.raises(ValueError, match=words):
        getattr(rnnkern.functional, function)(torch.ones(2, 1, 3), None, list(cls(3, 5).parameters()), **options)


def test_unknown_keywords() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'zone'"):
        rnnkern.LSTM(3, 5, zone=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'zone'"):
        rnnkern.functional.gru(torch.ones(2, 1, 3), None, list(rnnkern.GRU(3, 5).parameters()), zone=0.1)
