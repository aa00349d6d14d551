"""Stream: steps against torch.nn over the whole sequence, on every instruction set and by the functional call."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from isas import instruction_sets
from tolerance import check
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnkern
from rnnkern import Stream, _stream, dispatch


def ligru(*args: Any, **kwargs: Any) -> nn.Module:
    """In evaluation, after having seen something."""
    module = rnnkern.LiGRU(*args, **kwargs)
    for name, value in module.state_dict().items():
        if name.startswith("bn_"):
            value.uniform_(0.5, 2.0) if "mean" not in name else value.normal_()
    return module.eval()


def slstm(I: int, H: int, *args: Any, **kwargs: Any) -> nn.Module:
    """With two heads where H is even; of 1, 11 or 25 units for the sizes below."""
    heads = next((d for d in range(2, H + 1) if H % d == 0), 1)
    return rnnkern.SLSTM(I, H, *args, num_heads=heads, **kwargs)


CELLS: dict[str, Callable[..., nn.Module]] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "lstm": nn.LSTM,
    "lstm_projected": lambda *a, **k: nn.LSTM(*a, proj_size=7, **k),
    "gru": nn.GRU,
    "mgu": rnnkern.MGU,
    "indrnn_tanh": lambda *a, **k: rnnkern.IndRNN(*a, nonlinearity="tanh", **k),
    "indrnn_relu": rnnkern.IndRNN,
    "ligru": ligru,
    "slstm": rnnkern.SLSTM,
    "slstm_heads": slstm,
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(params=[pytest.param("reference", id="reference"), *instruction_sets()])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Streams made while this holds run there."""
    if request.param == "reference":
        with rnnkern.use_backend("reference"):
            yield request.param
        return
    from rnnkern.backends import cpp

    monkeypatch.setattr(cpp.BACKEND, "isa", request.param)
    yield request.param


def forms(dtype: torch.dtype) -> tuple[str | None, ...]:
    return (None,) if dtype == torch.float64 else (None, "bf16", "int8")


def expected_dtype(dtype: torch.dtype, form: str | None) -> torch.dtype:
    """int8 weights may be multiplied with 16-bit integers: what those keep of h is what float16 does."""
    return torch.float16 if form == "int8" and dtype == torch.float32 else dtype


def folded(module: rnnkern.LiGRU) -> nn.Module:
    """Its running estimates and gain in its weights and biases."""
    sizes = module.input_size, module.hidden_size, module.num_layers
    plain = rnnkern.LiGRU(*sizes, batch_norm=False, zoneout=module.zoneout, dtype=module.weight_ih_l0.dtype)
    for k in range(module.num_layers):
        gain, mean, var = (getattr(module, f"bn_{name}_l{k}").double() for name in ("ih", "mean", "var"))
        scale = gain / (var + module.eps).sqrt()
        bias = getattr(module, f"bias_ih_l{k}").double() if module.bias else 0
        getattr(plain, f"weight_ih_l{k}").copy_(getattr(module, f"weight_ih_l{k}").double() * scale.unsqueeze(1))
        getattr(plain, f"bias_ih_l{k}").copy_(bias - mean * scale)
        getattr(plain, f"weight_hh_l{k}").copy_(getattr(module, f"weight_hh_l{k}"))
        getattr(plain, f"bias_hh_l{k}").copy_(getattr(module, f"bias_hh_l{k}") if module.bias else torch.tensor(0.0))
    return plain


@torch.no_grad()
def kept(module: nn.Module, form: str | None) -> nn.Module:
    """The module with its weight matrices as a stream keeps them."""
    module = copy.deepcopy(module)
    if form is None:
        return module.double()
    if isinstance(module, rnnkern.LiGRU):
        module = folded(module)
    rounded = {}
    for name, p in module.named_parameters():
        value = p.detach().double()
        if p.dim() == 1:  # IndRNN's recurrence too
            pass
        elif "weight" in name and form == "bf16":
            value = p.detach().bfloat16().double()
        elif "weight" in name:
            q, scale = _stream.quantized(p.detach().flatten(0, -2))  # heads below each other
            value = (q.double() * scale.double().unsqueeze(1)).view_as(p)
        rounded[name] = value
    module.double().load_state_dict(rounded)
    return module


def flat(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def outputs(stream: Stream, x: Tensor) -> list[Tensor]:
    return [torch.stack([stream.step(row) for row in x]), *flat(stream.state)]


@torch.no_grad()
def whole(module: nn.Module, x: Tensor) -> list[Tensor]:
    with rnnkern.use_backend("reference"):  # of the cells that torch.nn does not have
        y, state = module(x)
    return [y, *flat(state)]


def agree(stream: Stream, module: nn.Module, x: Tensor, form: str | None, what: str, found: Any = None) -> None:
    truth = kept(module, form)
    yardstick = copy.deepcopy(truth).to(x.dtype)
    found = outputs(stream, x) if found is None else found
    assert all(t.dtype == x.dtype for t in found)
    check(found, whole(yardstick, x), whole(truth, x.double()), what, expected_dtype(x.dtype, form))


# I, H, T, layers, batch sizes: every remainder of lanes, pairs and quarters, and of rows in a tile
SIZES = [(1, 1, 4, 1, (1, 2)), (3, 17, 3, 2, (1, 4)), (33, 50, 3, 1, (1, 3)), (130, 33, 2, 2, (7, 17))]


@cells
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_the_sequence(cell: str, dtype: torch.dtype, engine: str) -> None:
    for (I, H, T, layers, batches), form in itertools.product(SIZES, forms(dtype)):
        if cell == "lstm_projected" and H < 9:
            continue
        for B, bias in zip(batches, (True, False), strict=True):
            module = CELLS[cell](I, H, layers, bias=bias).to(dtype)
            x = torch.randn(T, B, I).to(dtype)
            stream = Stream(module, B, weights=form)
            assert stream.backend == ("functional" if engine == "reference" else "cpp")
            agree(stream, module, x, form, f"I={I} H={H} layers={layers} bias={bias} weights={form} B={B}")


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("form", [None, "bf16", "int8"])
def test_cell_modules(kind: str, form: str | None, engine: str) -> None:
    for library, bias in itertools.product((nn, rnnkern), (True, False)):
        cell = getattr(library, kind)(9, 20, bias=bias)
        truth = kept(cell, form)
        x, state, ys = torch.randn(5, 3, 9), None, []
        with torch.no_grad(), rnnkern.use_backend("torch"):
            for row in x.double():
                state = truth(row, state)
                ys.append(flat(state)[0])
            float_state, float_ys = None, []
            for row in x:
                float_state = copy.deepcopy(truth).float()(row, float_state)
                float_ys.append(flat(float_state)[0])
        found = outputs(Stream(cell, 3, weights=form), x)
        yardstick, exact = [torch.stack(float_ys), *flat(float_state)], [torch.stack(ys), *flat(state)]
        check(found, yardstick, exact, kind, expected_dtype(torch.float32, form))


@cells
@pytest.mark.parametrize("batch_first", [False, True])
def test_run_continues(cell: str, batch_first: bool, engine: str) -> None:
    for form in (None, "int8"):
        module = CELLS[cell](6, 20, 2, batch_first=batch_first)
        stream, other = Stream(module, 3, weights=form), Stream(module, 3, weights=form)
        x = torch.randn(9, 3, 6)
        pieces = []
        for piece in (x[:4], x[4:5], x[5:]):
            y = stream.run(piece.transpose(0, 1) if batch_first else piece)
            pieces.append(y.transpose(0, 1) if batch_first else y)
        found = [torch.cat(pieces), *flat(stream.state)]
        check(found, (t := outputs(other, x)), t, "steps", expected_dtype(x.dtype, form))
        module = copy.deepcopy(module)
        module.batch_first = False
        agree(stream, module, x, form, f"weights={form}", found)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"zoneout": (0.1, 0.3), "recurrent_dropout": 0.5, "cell_clip": 0.2, "peephole": True}),
    ("LSTM", {"layer_norm": True, "proj_size": 7, "proj_clip": 0.1, "weight_dropout": 0.5, "grad_clip": 1.0}),
    (
        "LSTM",
        {"recurrent_dropout": 0.5, "recurrent_dropout_mode": "candidate", "grad_clip": 1.0},
    ),
    ("GRU", {"layer_norm": True, "bias": False}),
    ("MGU", {"zoneout": 0.2, "layer_norm": True}),
    ("IndRNN", {"zoneout": 0.2, "layer_norm": True}),
    ("LiGRU", {"zoneout": 0.2}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_options_are_those_of_evaluation(kind: str, options: dict[str, Any]) -> None:
    """The module may be in training: a stream is not. What only trains leaves the fast way as it was."""
    module, x = getattr(rnnkern, kind)(6, 20, 2, **options), torch.randn(5, 3, 6)
    for form in (None, "int8"):
        stream = Stream(module, 3, weights=form)
        lasting = {"zoneout", "layer_norm", "peephole", "cell_clip", "proj_clip"} & set(options)
        if lasting:
            assert stream.backend == "functional"
        truth = kept(module, form).eval()
        yardstick = copy.deepcopy(truth).float()
        check(outputs(stream, x), whole(yardstick, x), whole(truth, x.double()), kind, expected_dtype(x.dtype, form))
    stream.reset([0, 2])
    assert not any(s[:, [0, 2]].any() for s in flat(stream.state))


def test_batch_norm_of_a_module_in_training_is_that_of_evaluation(engine: str) -> None:
    module, x = ligru(6, 20, 2, bias=False), torch.randn(5, 3, 6)
    stream, before = Stream(module.train(), 3), copy.deepcopy(module.state_dict())
    found = outputs(stream, x)
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    agree(stream, module.eval(), x, None, "estimates", found)


def test_run_without_a_batch(engine: str) -> None:
    x = torch.randn(4, 6)
    for batch_first in (False, True):
        module = nn.GRU(6, 20, batch_first=batch_first)
        y, stream = Stream(module).run(x), Stream(module)
        assert y.shape == (4, 20)
        check(y, (t := torch.cat([stream.step(row) for row in x.unsqueeze(1)])), t)


@cells
@pytest.mark.parametrize("form", [None, "bf16", "int8"])
def test_rows_advance_while_others_rest(cell: str, form: str | None, engine: str) -> None:
    """Every row is the stream that it would be alone, whatever the others do; a row at rest is not read."""
    B, module = 5, CELLS[cell](6, 33, 2)
    stream, alone = Stream(module, B, weights=form), [Stream(module, weights=form) for _ in range(B)]
    chosen: list[Any] = [
        [0, 3],
        torch.tensor([True, False, True, True, False]),
        torch.tensor([4]),
        [],
        torch.tensor([-1, 1], dtype=torch.int32),
        [False, True, False, False, True],
        torch.zeros(B, dtype=torch.bool),
        None,
    ]
    for rows in chosen:
        active = (
            set(range(B))
            if rows is None
            else set(torch.arange(B)[torch.as_tensor(rows, dtype=None if len(rows) else torch.long)].tolist())
        )
        x = torch.full((B, 6), float("nan"))
        x[sorted(active)] = torch.randn(len(active), 6)
        y = stream.step(x, rows)
        for b in range(B):
            if b in active:
                check(y[b], (t := alone[b].step(x[b : b + 1])[0]), t, f"row {b}", expected_dtype(x.dtype, form))
            else:
                assert not y[b].any()
    for b in range(B):
        for a, c in zip(flat(stream.state), flat(alone[b].state), strict=True):
            check(a[:, b], c[:, 0], c[:, 0], f"state of row {b}", expected_dtype(a.dtype, form))


@cells
def test_reset_and_state(cell: str, engine: str) -> None:
    module, x = CELLS[cell](6, 20, 2), torch.randn(8, 3, 6)
    stream = Stream(module, 3)
    first = outputs(stream, x[:4])
    saved = stream.state
    kept_state = [s.clone() for s in flat(saved)]
    rest = outputs(stream, x[4:])
    assert all(torch.equal(a, b) for a, b in zip(flat(saved), kept_state, strict=True)), "state is not a copy"
    stream.state = saved
    assert all(torch.equal(a, b) for a, b in zip(outputs(stream, x[4:]), rest, strict=True))
    for s in flat(saved):
        s.fill_(7)  # the stream has its own
    stream.reset()
    assert not any(s.any() for s in flat(stream.state))
    assert all(torch.equal(a, b) for a, b in zip(outputs(stream, x[:4]), first, strict=True))
    stream.reset([1])
    for s, before in zip(flat(stream.state), first[1:], strict=True):
        assert not s[:, 1].any() and torch.equal(s[:, [0, 2]], before[:, [0, 2]])
    stream.reset(torch.tensor([True, False, True]))
    assert not any(s.any() for s in flat(stream.state))
    outputs(stream, x[:2])
    stream.state = None
    assert not any(s.any() for s in flat(stream.state))
    # A state goes into the module, and a module's into a stream.
    stream.reset()
    outputs(stream, x[:4])
    with torch.no_grad():
        y, final = module(x[4:], stream.state)
    found = outputs(stream, x[4:])
    check(found, [y, *flat(final)], [y, *flat(final)], "handed over")
    stream.state = final
    assert all(torch.equal(a, b) for a, b in zip(flat(stream.state), flat(final), strict=True))


def test_state_of_a_cell_has_no_layers(engine: str) -> None:
    stream = Stream(nn.LSTMCell(6, 20), 3)
    stream.step(torch.randn(3, 6))
    h, c = stream.state
    assert h.shape == c.shape == (3, 20)
    stream.state = (c, h)
    assert torch.equal(stream.state[0], c) and torch.equal(stream.state[1], h)


def test_states_of_another_number_are_refused(engine: str) -> None:
    zeros = torch.zeros(1, 3, 20)
    for module, wanted, given in (
        (nn.GRU(6, 20), 1, (zeros, zeros)),
        (nn.LSTM(6, 20), 2, zeros),
        (rnnkern.SLSTM(6, 20), 4, (zeros, zeros)),
    ):
        stream = Stream(module, 3)
        with pytest.raises(ValueError, match=f"expected a state of {wanted} tensors, got {len(flat(given))}"):
            stream.state = given


@pytest.mark.parametrize("form", [None, "bf16", "int8"])
def test_weights_are_a_snapshot(form: str | None, engine: str) -> None:
    module, x = nn.LSTM(6, 20, 2), torch.randn(3, 2, 6)
    stream, before = Stream(module, 2, weights=form), copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(-0.5)
    agree(stream, before, x, form, "as they were")
    state = flat(stream.state)
    stream.refresh()
    assert all(torch.equal(a, b) for a, b in zip(flat(stream.state), state, strict=True))
    stream.reset()
    agree(stream, module, x, form, "as they are")


def test_parametrized_weights_are_read(engine: str) -> None:
    module = nn.GRU(6, 20)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(3, 2, 6)
    with torch.no_grad():
        y = module(x)[0]
    check(torch.stack([s.step(r) for s in [Stream(module, 2)] for r in x]), y, y)


def test_out_is_written_and_returned(engine: str) -> None:
    module, x = nn.GRU(20, 20), torch.randn(4, 2, 20)
    out = torch.empty(2, 20)
    stream, fresh = Stream(module, 2, out=out), Stream(module, 2)
    for row in x:
        y = fresh.step(row)
        assert stream.step(row) is out and torch.equal(out, y)
        assert fresh.step(row, []).data_ptr() != y.data_ptr()
    for _ in range(3):  # what came out goes in
        y = fresh.step(out.clone())
        assert torch.equal(stream.step(out), y)
    assert stream.run(x).data_ptr() != out.data_ptr()
    y = fresh.step(x[0])
    y.zero_()
    assert flat(fresh.state)[0].any(), "an output shares memory with the state"


def test_dtype_of_its_own(engine: str) -> None:
    module, x = nn.LSTM(6, 20), torch.randn(5, 2, 6)
    for dtype in DTYPES:
        stream = Stream(module, 2, dtype=dtype)
        agree(stream, copy.deepcopy(module).to(dtype), x.to(dtype), None, str(dtype))


def test_inputs_of_every_kind(engine: str) -> None:
    """Strided, negated, a parameter, one that asks for a gradient: all as their values say; no gradient comes out."""
    module, x = nn.GRU(6, 20).train(), torch.randn(2, 6)
    want = Stream(module, 2).step(x)
    wide = torch.zeros(2, 12)
    wide[:, ::2] = x
    negated = torch.complex(torch.zeros(2, 6), -x).conj().imag
    assert negated.is_neg() and torch.equal(negated, x)
    for given in (wide[:, ::2], x.t().contiguous().t(), negated, nn.Parameter(x), x.clone().requires_grad_()):
        y = Stream(module, 2).step(given)
        assert torch.equal(y, want) and not y.requires_grad
    with torch.inference_mode():
        stream = Stream(module, 2)
        assert torch.equal(stream.step(x), want)
    stream.step(x), stream.reset(), stream.run(x.unsqueeze(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Stream(module, 2).step(x), want)


@cells
@pytest.mark.parametrize("form", [None, "bf16", "int8"])
def test_nan_and_infinity_go_through_in_their_row(cell: str, form: str | None, engine: str) -> None:
    module, x = CELLS[cell](6, 20), torch.randn(4, 7, 6)
    x[1, 2, 3], x[1, 4, 0], x[2, 5, 5] = float("nan"), float("inf"), -float("inf")
    agree(Stream(module, 7, weights=form), module, x, form, "strange")


@pytest.mark.parametrize("form", [None, "int8"])
def test_values_far_apart(form: str | None, engine: str) -> None:
    """Inputs a thousand times larger or smaller than h lose none of h's digits."""
    module = nn.GRU(6, 40)
    for scale in (1e-35, 1e-3, 1e3):
        with torch.no_grad():
            module.weight_ih_l0.copy_(torch.randn(120, 6) / max(scale, 1e-3))
        agree(Stream(module, 2, weights=form), module, torch.randn(6, 2, 6) * scale, form, f"scale {scale}")


def test_a_sum_of_int8_as_long_as_may_be(engine: str) -> None:
    """All of one sign and of the largest value: sums of bytes come close to the end of 32 bits."""
    module = nn.RNN(65536, 2, nonlinearity="relu")
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.tensor([1.0, -1.0]).unsqueeze(1).expand(2, 65536) / 256)
    for x in (torch.ones(1, 1, 65536), -torch.ones(1, 1, 65536), torch.rand(1, 1, 65536)):
        agree(Stream(module, weights="int8"), module, x, "int8", "long")


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_every_width(form: str | None, dtype: torch.dtype, engine: str) -> None:
    for heads, width in ((2, 3), (1, 16), (3, 16), (5, 40), (2, 64)):
        module = rnnkern.SLSTM(5, heads * width, 2, num_heads=heads).to(dtype)
        agree(Stream(module, 3, weights=form), module, torch.randn(4, 3, 5).to(dtype), form, f"{heads} of {width}")


@pytest.mark.parametrize("form", [None, "bf16", "int8"])
def test_a_head_sees_nothing_of_others(form: str | None, engine: str) -> None:
    """Not even NaN, which no weight of 0 would keep away."""
    for heads, width in ((4, 5), (2, 17)):
        module, x = rnnkern.SLSTM(6, heads * width, num_heads=heads), torch.randn(3, 2, 6)
        clean, strange = Stream(module, 2, weights=form), Stream(module, 2, weights=form)
        for stream in (clean, strange):
            stream.step(x[0])
        h, *rest = strange.state
        h[..., width : 2 * width] = float("nan")
        strange.state = (h, *rest)
        for row in x[1:]:
            wanted, found = (stream.step(row).unflatten(1, (heads, width)) for stream in (clean, strange))
            assert found[:, 1].isnan().all()
            others = [k for k in range(heads) if k != 1]
            assert torch.equal(found[:, others], wanted[:, others])


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "slstm_heads"])
def test_streams_in_threads_of_their_own(cell: str, engine: str) -> None:
    """Large enough to let go of Python's lock, and small."""
    for H in (16, 512 if engine != "reference" else 32):
        module, x = CELLS[cell](H, H), torch.randn(5, 2, H)
        want = outputs(Stream(module, 2), x)
        streams = [Stream(module, 2) for _ in range(4)]
        found: list[list[Tensor]] = []

        def work(stream: Stream, x: Tensor = x, found: list[list[Tensor]] = found) -> None:
            for _ in range(5):
                stream.reset()
                found.append(outputs(stream, x))

        workers = [threading.Thread(target=work, args=(s,)) for s in streams]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 20
        for got in found:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_stream_in_two_threads(engine: str) -> None:
    """Every call either has its turn or raises, and those that had are a sequence: no row is half advanced."""
    H = 512 if engine != "reference" else 32
    module, x = nn.GRU(H, H), torch.randn(1, H)
    stream, done, refused = Stream(module), [], []

    def work() -> None:
        for _ in range(20):
            try:
                done.append(stream.step(x))
            except RuntimeError as error:
                assert "in use by another thread" in str(error)
                refused.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(done) + len(refused) == 80 and done
    again = Stream(module)
    want = {tuple(again.step(x).flatten().tolist()) for _ in done}
    assert {tuple(y.flatten().tolist()) for y in done} == want


# ---- calls that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "rows", "error", "message"),
    [
        (torch.zeros(2, 6), None, ValueError, r"expected x of shape \[3, 6\], got \[2, 6\]"),
        (torch.zeros(3, 5), None, ValueError, r"expected x of shape \[3, 6\], got \[3, 5\]"),
        (torch.zeros(6), None, ValueError, r"expected x of shape \[3, 6\], got \[6\]"),
        (torch.zeros(3, 6, dtype=torch.float64), None, ValueError, "dtype torch.float32, got torch.float64"),
        (torch.zeros(3, 6, dtype=torch.long), None, ValueError, "dtype torch.float32, got torch.int64"),
        (torch.zeros(3, 6, device="meta"), None, ValueError, "expected x on cpu, got meta"),
        ([[0.0] * 6] * 3, None, TypeError, "expected x to be a tensor, got list"),
        (torch.zeros(3, 6), [3], IndexError, r"rows must lie in \[-3, 2\], got \[3\]"),
        (torch.zeros(3, 6), torch.tensor([-4]), IndexError, r"rows must lie in \[-3, 2\], got \[-4\]"),
        (torch.zeros(3, 6), torch.tensor([1, 1]), ValueError, r"expected each row once, got \[1, 1\]"),
        (torch.zeros(3, 6), [1, -2], ValueError, "expected each row once"),
        (
            torch.zeros(3, 6),
            torch.tensor([0, 1], dtype=torch.uint8),
            ValueError,
            "a bool mask or a list of indices, got",
        ),
        (torch.zeros(3, 6), torch.ones(2, dtype=torch.bool), ValueError, r"mask of rows of shape \[3\], got \[2\]"),
        (torch.zeros(3, 6), torch.ones(1), ValueError, "expected a bool mask or a list of indices, got 1-D"),
        (torch.zeros(3, 6), 1, ValueError, "expected a bool mask or a list of indices, got 0-D"),
    ],
)
def test_bad_input_leaves_the_state(x: Any, rows: Any, error: type, message: str, engine: str) -> None:
    stream = Stream(nn.LSTM(6, 20), 3)
    stream.step(torch.randn(3, 6))
    before = flat(stream.state)
    with pytest.raises(error, match=message):
        stream.step(x, rows)
    assert all(torch.equal(a, b) for a, b in zip(flat(stream.state), before, strict=True))


def test_other_bad_calls(engine: str) -> None:
    stream = Stream(nn.LSTM(6, 20), 3)
    for x, error, message in (
        (torch.zeros(4, 2, 6), ValueError, r"expected x of shape \[4, 3, 6\], got \[4, 2, 6\]"),
        (torch.zeros(4, 6), ValueError, "expected x of shape"),
        (torch.zeros(0, 3, 6), RuntimeError, "sequence length to be larger than 0"),
        (None, TypeError, "expected x to be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            stream.run(x)
    zeros = torch.zeros(1, 3, 20)
    for state, message in (
        ((zeros, zeros[:, :2]), r"expected state of shape \[1, 3, 20\], got \[1, 2, 20\]"),
        ((zeros, zeros.double()), "dtype torch.float32, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.state = state
    with pytest.raises(IndexError, match="rows must lie in"):
        stream.reset([5])
    with pytest.raises(TypeError, match="no numbers to read"):
        torch.func.vmap(stream.step)(torch.zeros(2, 3, 6)) if engine != "reference" else pytest.skip("it can")
    with pytest.raises(TypeError, match="a state without numbers to read"):
        torch.func.vmap(lambda h: setattr(stream, "state", (h, zeros)))(torch.zeros(2, 1, 3, 20))


@pytest.mark.parametrize("hidden", [6, 20])
def test_under_a_mode_that_makes_no_tensors(hidden: int, engine: str) -> None:
    """As a trace does: refused with the state as it was, and the same stream goes on afterwards."""
    if engine == "reference":
        pytest.skip("it runs under any mode")
    stream, x = Stream(nn.GRU(6, hidden)), torch.randn(1, 6)
    for _ in range(2):
        before = flat(stream.state)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match="a mode makes FakeTensor"):
            stream.step(x)
        assert all(torch.equal(a, b) for a, b in zip(flat(stream.state), before, strict=True))
        assert stream.step(x).any()


class Own(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


def hooked() -> nn.Module:
    module = nn.GRU(6, 20)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Stream(nn.LSTM(6, 20, bidirectional=True)),
            ValueError,
            "bidirectional: its backward direction begins",
        ),
        (lambda: Stream(nn.Linear(6, 20)), TypeError, "expected a module of torch.nn or rnnkern .*, got Linear"),
        (lambda: Stream(Own(6, 20)), TypeError, "Own has a forward of its own"),
        (lambda: Stream(hooked()), TypeError, "has forward hooks"),
        (lambda: Stream(nn.LSTM(6, 20), 0), ValueError, "batch_size must be an integer of 1 or more, got 0"),
        (lambda: Stream(nn.LSTM(6, 20), 2.0), ValueError, "batch_size must be an integer"),
        (lambda: Stream(nn.LSTM(6, 20), weights="int4"), ValueError, "must be None, 'bf16' or 'int8', got 'int4'"),
        (lambda: Stream(nn.LSTM(6, 20).double(), weights="int8"), ValueError, "not for float64"),
        (lambda: Stream(nn.RNN(65537, 1), weights="int8"), ValueError, "takes up to 65536 features, got 65537"),
        (lambda: Stream(nn.LSTM(6, 20), dtype=torch.int32), ValueError, "got torch.int32"),
        (lambda: Stream(nn.LSTM(6, 20), out=torch.empty(1, 6)), ValueError, r"out of shape \[1, 20\], got \[1, 6\]"),
        (lambda: Stream(nn.LSTM(6, 20), 2, out=torch.empty(20, 2).t()), ValueError, "out must be contiguous"),
    ],
)
def test_streams_that_cannot_be(make: Callable[[], Stream], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_refresh_that_does_not_fit(engine: str) -> None:
    module, x = nn.LSTM(6, 20), torch.randn(1, 6)
    stream, other = Stream(module, weights="int8"), Stream(module, weights="int8")
    with torch.no_grad():
        module.weight_hh_l0[3, 3] = float("nan")
    with pytest.raises(ValueError, match="int8' needs finite weights; those of layer 0"):
        stream.refresh()
    module.weight_hh_l0 = nn.Parameter(torch.zeros(80, 19))
    with pytest.raises(RuntimeError):
        stream.refresh()
    assert torch.equal(stream.step(x), other.step(x))


def test_backend_of_a_stream() -> None:
    with rnnkern.use_backend("reference"):
        stream = Stream(nn.LSTM(6, 20))
    assert stream.backend == "functional"
    stream.step(torch.zeros(1, 6))
    assert dispatch.last() == "reference"
    assert "LSTM(6, 20)" in repr(stream) and dataclasses.is_dataclass(stream._shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@cells
def test_on_a_gpu(cell: str) -> None:
    module, x = CELLS[cell](6, 20, 2).cuda(), torch.randn(5, 3, 6)
    stream = Stream(module, 3)
    found = [v.cpu() for v in outputs(stream, x.cuda())]
    truth = whole(copy.deepcopy(module).cpu().double(), x.double())
    check(found, [v.cpu() for v in whole(module, x.cuda())], truth)
