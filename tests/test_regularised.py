"""The options of regularised and richer cells, on every backend that does them, against loops written out here.

The loops are torch operations, one step at a time, and draw from the generator in the order that _regularised.py
promises. Equations: recurrent dropout of Gal and Ghahramani 2016 (one mask per sequence) and of Semeniuta et al. 2016
(the candidate, anew each step), zoneout of Krueger et al. 2017, weight dropout of Merity et al. 2018, peepholes of Gers
and Schmidhuber 2000, clipping of Sak et al. 2014, layer norm of Ba et al. 2016.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stacks import D, draw, flat, gradients
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import dispatch

KINDS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "GRU": {},
    "LSTM": {},
    "LSTM proj": {"proj_size": 4},
}
T, B, I, H = 6, 3, 3, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "sequence": {"recurrent_dropout": 0.4},
    "step": {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "step"},
    "candidate": {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "candidate"},
    "zoneout": {"zoneout": 0.3},
    "zoneout of both": {"zoneout": (0.2, 0.4)},
    "zoneout of c": {"zoneout": (0.0, 0.4)},
    "weight dropout": {"weight_dropout": 0.4},
    "cell clip": {"cell_clip": 0.3},
    "proj clip": {"proj_clip": 0.1},
    "layer norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "masks": {"recurrent_dropout": 0.2, "zoneout": 0.2, "weight_dropout": 0.2, "dropout": 0.3},
    "all": {
        "recurrent_dropout": 0.2,
        "zoneout": (0.1, 0.2),
        "weight_dropout": 0.2,
        "cell_clip": 0.5,
        "layer_norm": True,
        "peephole": True,
    },
}
LSTM_ONLY = {"zoneout of both", "zoneout of c", "cell clip", "peephole", "all"}
LAYOUTS = ("dense", "lengths", "packed", "reset", "unbatched")


def combinations() -> list[tuple[str, str]]:
    """Kind and option, where the kind has it."""
    found = []
    for kind in KINDS:
        for option in OPTIONS:
            lstm = kind.startswith("LSTM")
            if (lstm or option not in LSTM_ONLY) and (option != "proj clip" or kind == "LSTM proj"):
                if option != "candidate" or not kind.startswith("RNN"):
                    found.append((kind, option))
    return found


def made(kind: str, layers: int = 2, **options: Any) -> Any:
    module = getattr(rnnkern, kind.split()[0])(I, H, layers, bidirectional=True, dtype=D, **KINDS[kind], **options)
    with torch.no_grad():
        for p in module.parameters():  # gains of 1 and biases of 0 would hide a wrong place
            p.copy_(torch.randn_like(p) * 0.6)
    return module


def run(module: Any, backend: str, *args: Any, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(5)
    with rnnkern.use_backend(backend):
        return flat(module(*args, **kwargs))


def skip_if_refused(backend: str, module: Any, *args: Any, **kwargs: Any) -> None:
    """With the backend's own reasons, given the scans of this call."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda inputs: seen.append(inputs) or "reference")
        module(*args, **kwargs)
    reasons = {reason for inputs in seen for reason in dispatch.backend(backend).unsupported(inputs)}
    if reasons:
        pytest.skip(f"backend {backend}: {'; '.join(sorted(reasons))}")


# ---- the equations ---------------------------------------------------------------------------------------------------


def layer_norm(v: Tensor) -> Tensor:
    """Ba et al. 2016, equation 3, without gain and bias."""
    return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def clipped(v: Tensor, bound: float) -> Tensor:
    return v.clamp(-bound, bound) if bound else v


class Direction:
    """One layer in one direction, step by step. `w` are its weights by name."""

    def __init__(self, m: Any, w: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        self.m, self.w, self.masks = m, w, masks

    def norm(self, v: Tensor, gain: str) -> Tensor:
        """Of a product: all gates of LSTM and RNN together, of GRU r and z together and n alone."""
        if not self.m.layer_norm:
            return v
        pieces = (v[:, : 2 * H], v[:, 2 * H :]) if self.m.mode == "GRU" else (v,)
        return torch.cat([layer_norm(p) for p in pieces], 1) * self.w[gain]

    def step(self, t: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        m, w, old = self.m, self.w, (h, c)
        keep = 1 / (1 - m.recurrent_dropout)
        if "sequence" in self.masks:
            h = h * self.masks["sequence"] * keep
        if "step" in self.masks:
            h = h * self.masks["step"][t] * keep
        candidate = self.masks["candidate"][t].to(D) * keep if "candidate" in self.masks else 1
        a = self.norm(x @ w["weight_ih"].T, "ln_ih") + w["bias_ih"]
        b = self.norm(h @ w["weight_hh"].T, "ln_hh") + w["bias_hh"]
        if m.mode == "LSTM":
            i, f, g, o = (a + b).chunk(4, 1)
            if m.peephole:
                i, f = i + w["peephole_i"] * c, f + w["peephole_f"] * c
            c = clipped(f.sigmoid() * c + i.sigmoid() * (g.tanh() * candidate), m.cell_clip)
            if m.peephole:
                o = o + w["peephole_o"] * c
            u = layer_norm(c) * w["ln_c"] + w["ln_c_bias"] if m.layer_norm else c
            h = o.sigmoid() * u.tanh()
            if m.proj_size:
                h = clipped(h @ w["weight_hr"].T, m.proj_clip)
        elif m.mode == "GRU":
            (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
            n = (an + (ar + br).sigmoid() * bn).tanh() * candidate
            z = (az + bz).sigmoid()
            h = (1 - z) * n + z * old[0]
        else:
            h = (a + b).tanh() if m.mode == "RNN_TANH" else (a + b).relu()
        return self.zoned("zoneout_h", t, 0, old[0], h), self.zoned("zoneout_c", t, 1, old[1], c)

    def zoned(self, name: str, t: int, k: int, old: Tensor, new: Tensor) -> Tensor:
        zoneout = self.m.zoneout
        p = zoneout[k] if isinstance(zoneout, tuple) else zoneout
        if name in self.masks:
            return torch.where(self.masks[name][t], old, new)
        return new if self.m.training else p * old + (1 - p) * new


def written_out(
    m: Any, x: Tensor, hx: tuple[Tensor, ...], lengths: Tensor, rows: Tensor, reset: Tensor
) -> list[Tensor]:
    """Output [T, B, 2 P] and final states. `rows` [T, B] says which row of a mask each step has."""
    torch.manual_seed(5)
    batch, P, two = x.shape[1], m.proj_size or H, m.mode == "LSTM"
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "ln_ih", "ln_hh", "ln_c", "ln_c_bias"]
    names += ["peephole_i", "peephole_f", "peephole_o"]
    groups = [(k, end) for k in range(m.num_layers) for end in ("", "_reverse")]
    weights = [{n: p for n in names if (p := getattr(m, f"{n}_l{k}{end}", None)) is not None} for k, end in groups]
    if m.training and m.weight_dropout:
        for w in weights:
            w["weight_hh"] = torch.dropout(w["weight_hh"], m.weight_dropout, True)
    S, finals = int(rows.max()) + 1, []
    for k in range(m.num_layers):
        masks = drawn(m, S, batch, P, rows) if m.training else [{}, {}]
        outputs = []
        for d in range(2):
            one = Direction(m, weights[2 * k + d], masks[d])
            h = hx[0][2 * k + d]
            c = hx[1][2 * k + d] if two else h
            columns: list[Any] = [None] * T
            for t in range(T) if d == 0 else reversed(range(T)):
                # A reset lies between t - 1 and t: walking back, it is met on entering t - 1.
                at = t if d == 0 else t + 1
                fresh = (reset[at] & (at < lengths) if at < T else torch.zeros(batch, dtype=torch.bool))[:, None]
                alive = (t < lengths)[:, None]
                entering = torch.where(fresh, 0, h), torch.where(fresh, 0, c)
                new = one.step(t, x[t], *entering)
                h, c = torch.where(alive, new[0], h), torch.where(alive, new[1], c)
                columns[t] = torch.where(alive, h, 0)
            outputs.append(torch.stack(columns))
            finals.append((h, c) if two else (h,))
        x = torch.cat(outputs, -1)
        y = x
        if m.dropout and m.training and k < m.num_layers - 1:
            packed = x.new_zeros(S, x.shape[-1]).index_put((rows[rows >= 0],), x[rows >= 0])
            x = torch.zeros_like(x).index_put((rows >= 0,), torch.dropout(packed, m.dropout, True)[rows[rows >= 0]])
    return [y, *(torch.stack(parts) for parts in zip(*finals, strict=True))]


def drawn(m: Any, S: int, batch: int, P: int, rows: Tensor) -> list[dict[str, Tensor]]:
    """One layer's masks, for each direction."""
    found: dict[str, Tensor] = {}
    p, mode = m.recurrent_dropout, m.recurrent_dropout_mode
    if p and mode == "sequence":
        found[mode] = torch.rand(2, batch, P) >= p
    elif p:
        found[mode] = torch.rand(S, 2, P if mode == "step" else H) >= p
    zoneout = m.zoneout if isinstance(m.zoneout, tuple) else (m.zoneout, m.zoneout)
    if zoneout[0]:
        found["zoneout_h"] = torch.rand(S, 2, P) < zoneout[0]
    if zoneout[1] and m.mode == "LSTM":
        found["zoneout_c"] = torch.rand(S, 2, H) < zoneout[1]
    return [{n: v[d] if n == "sequence" else v[:, d][rows.clamp_min(0)] for n, v in found.items()} for d in range(2)]


def compare(m: Any, layout: str, backend: str) -> None:
    batch, two = 1 if layout == "unbatched" else B, m.mode == "LSTM"
    x, lengths = draw(T, batch, I), torch.full((batch,), T)
    widths = (m.proj_size or H, H) if two else (H,)
    hx = tuple(draw(4, batch, width) for width in widths)
    rows = torch.arange(T * batch).view(T, batch)
    reset = torch.zeros(T, batch, dtype=torch.bool)
    kwargs: dict[str, Any] = {}
    given: Any = x
    states = hx
    if layout == "lengths":
        lengths = torch.tensor([4, 0, T])
        kwargs["lengths"] = lengths
        given = x.masked_fill((torch.arange(T)[:, None] >= lengths)[..., None], float("nan"))
    elif layout == "reset":
        reset = torch.rand(T, batch) < 0.3
        kwargs["reset"] = reset
    elif layout == "packed":
        lengths = torch.tensor([T, 4, 2])
        given = pack_padded_sequence(x, lengths)
        exists = torch.arange(T)[:, None] < lengths
        rows = torch.where(exists, exists.flatten().cumsum(0).view(T, batch) - 1, -1)
    elif layout == "unbatched":
        given, states = x[:, 0], tuple(h[:, 0] for h in hx)
    argument = states if two else states[0]
    skip_if_refused(backend, m, given, argument, **kwargs)
    ours = run(m, backend, given, argument, **kwargs)
    truth = written_out(m, x, hx, lengths, rows, reset)
    if layout == "packed":
        truth[0] = truth[0][rows >= 0]
    elif layout == "unbatched":
        truth = [v.squeeze(1) for v in truth]
    check(ours, truth, truth, layout)
    with torch.no_grad():
        check(run(m, backend, given, argument, **kwargs), truth, truth, f"{layout}, no gradient to come")
    wrt = [x, *hx, *m.parameters()]
    expected = gradients(truth, wrt)
    check_grad(gradients(ours, wrt), expected, expected, f"{layout}, gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, option", combinations())
def test_training(kind: str, option: str, layout: str, backend: str) -> None:
    compare(made(kind, **OPTIONS[option]), layout, backend)


@pytest.mark.parametrize("layout", ["dense", "lengths"])
@pytest.mark.parametrize("kind, option", combinations())
def test_evaluation(kind: str, option: str, layout: str, backend: str) -> None:
    """No masks; zoneout mixes by its probabilities."""
    compare(made(kind, **OPTIONS[option]).eval(), layout, backend)


@pytest.mark.parametrize("kind, option", combinations())
def test_memory_recompute(kind: str, option: str) -> None:
    """The same numbers in segments, masks and gradients of both directions among them."""
    m = made(kind, **OPTIONS[option])
    x, results = draw(T, B, I), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnnkern._recompute.SMALLEST", 1)
        for m.memory in ("save", "recompute"):
            outputs = run(m, "reference", x, lengths=[4, 0, T], return_states=True)
            results.append((outputs, gradients(outputs, [x, *m.parameters()])))
    (kept, dkept), (less, dless) = results
    check(less, kept, kept)
    check_grad(dless, dkept, dkept)


@pytest.mark.parametrize("kind, option", combinations())
def test_gradcheck(kind: str, option: str) -> None:
    m = made(kind, 1, **{**OPTIONS[option], "dropout": 0.0})
    x, names = draw(3, 2, I), [name for name, _ in m.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        with rnnkern.use_backend("reference"):
            return tuple(flat(torch.func.functional_call(m, dict(zip(names, weights, strict=True)), (x,))))

    assert torch.autograd.gradcheck(call, (x, *m.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_vmap_and_graphs(kind: str) -> None:
    """By the ways that every call has: the reference differentiated, masks folded with the rows, rand in the graph."""
    m = made(kind, 1, layer_norm=True, zoneout=0.2, recurrent_dropout=0.3)
    x = draw(T, B, I)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return m(x)[0].square().sum()

    assert torch.autograd.gradgradcheck(lambda x: (loss(x),), (x[:2, :1].detach().requires_grad_(),))
    m.eval()
    each = torch.stack([m(v)[0] for v in (x, 2 * x)])
    mapped = torch.func.vmap(lambda v: m(v)[0])(torch.stack([x, 2 * x]))
    check(mapped, each, each, "vmap")
    per_sample = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x]).detach())
    expected = torch.stack([torch.func.grad(loss)(v) for v in (x.detach(), 2 * x.detach())])
    check_grad(per_sample, expected, expected, "per-sample gradients")
    with torch._dynamo.config.patch(allow_rnn=True):
        graph = torch.compile(m, backend="aot_eager", fullgraph=True)
        check(flat(graph(x)), flat(m(x)), flat(m(x)), "graph")
        m.train()
        y = graph(x)[0]
        assert y.shape == (T, B, 2 * (m.proj_size or H)) and not torch.equal(y, graph(x)[0])
        y.sum().backward()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_masks_under_vmap(randomness: str) -> None:
    m = made("LSTM", 1, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(1, T, B, I, dtype=D).expand(2, T, B, I)
    first, second = torch.func.vmap(lambda v: m(v)[0], randomness=randomness)(x)
    assert torch.equal(first, second) == (randomness == "same")


# ---- grad_clip: no derivative of anything, so by hand ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_grad_clip(kind: str, backend: str) -> None:
    """After Graves 2013: the gradients that leave a step are clamped, and what the loss gives each step is not."""
    bound = 0.05
    m = made(kind, 1, grad_clip=bound)
    x, two = draw(T, B, I), m.mode == "LSTM"
    hx = tuple(draw(2, B, width) for width in ((m.proj_size or H, H) if two else (H,)))
    argument = hx if two else hx[0]
    skip_if_refused(backend, m, x, argument)
    ours = run(m, backend, x, argument)
    free = copy.deepcopy(m)
    free.grad_clip = 0.0

    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            return v.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            return d.clamp(-bound, bound)

    finals, outputs = [], []
    for d, end in enumerate(("", "_reverse")):
        one = Direction(free, {n: getattr(free, f"{n}_l0{end}") for n in NAMES if hasattr(free, f"{n}_l0{end}")}, {})
        h, c = hx[0][d], hx[-1][d]
        columns: list[Any] = [None] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            h, c = one.step(t, x[t], Clamp.apply(h), Clamp.apply(c))
            columns[t] = h
        outputs.append(torch.stack(columns))
        finals.append((h, c)[: len(hx)])
    truth = [torch.cat(outputs, -1), *(torch.stack(parts) for parts in zip(*finals, strict=True))]
    check(ours, truth, truth)
    expected = gradients(truth, [x, *hx, *free.parameters()])
    check_grad(gradients(ours, [x, *hx, *m.parameters()]), expected, expected, kind)


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_reproducible_and_only_in_training() -> None:
    m = made("LSTM", **OPTIONS["all"])
    x = draw(T, B, I)
    first, again = run(m, None, x), run(m, None, x)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(m(x)[0], first[0])
    m.eval()
    before = torch.get_rng_state()
    assert torch.equal(m(x)[0], m(x)[0]) and torch.equal(torch.get_rng_state(), before)


def test_one_mask_per_sequence_and_direction() -> None:
    """What is dropped stays so at every step, and each direction and row has its own."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda inputs: seen.append(inputs) or "reference")
        made("GRU", recurrent_dropout=0.5)(draw(T, B, I))
    for inputs in seen:
        (mask,) = inputs.noise
        assert mask.dtype == torch.bool and mask.shape == (2, B, H) and inputs.spec.scales == (2.0,)
        assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(seen[0].noise[0], seen[1].noise[0])


def test_every_dtype_draws_the_same_masks() -> None:
    found = []
    for dtype in (D, torch.float32, torch.bfloat16):
        m = rnnkern.LSTM(I, H, recurrent_dropout=0.3, zoneout=0.3, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "choose", lambda inputs: found.append(inputs.noise) or "reference")
            torch.manual_seed(5)
            m(torch.zeros(T, B, I, dtype=dtype))
    for masks in found[1:]:
        assert len(masks) == 3 and all(torch.equal(a, b) for a, b in zip(masks, found[0], strict=True))
