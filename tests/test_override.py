"""override(): torch's own ops run on rnnkern with torch's numbers, and nothing of it is left afterwards."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS, LAYOUTS, draw, example, flat, gradients, precise, torch_has_lstm
from tolerance import check, check_grad
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern import _override, dispatch

AUTOMATIC = "torch" if dispatch.unavailable("cpp") else "cpp"
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", [None, "reference", "torch"])


def module_of(kind: str, *args: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return getattr(nn, kind.split()[0])(*args, dtype=dtype, **{**KINDS, **CELLS}[kind], **options)


def last_after(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, and the backend that its last call took; None: rnnkern has seen no call."""
    dispatch._choice.last = None
    return run(), dispatch.last()


def same_as_torch(
    run: Callable[[], Any], wrt: list[Tensor], what: str = "", backend: str | None = None, taken: str | None = AUTOMATIC
) -> None:
    """Results and gradients with and without the override; `taken` is the backend that a call must have taken."""
    torch.manual_seed(3)
    theirs = flat(run())
    with rnnkern.override(), rnnkern.use_backend(backend):
        torch.manual_seed(3)
        result, last = last_after(run)
        ours = flat(result)
        if wrt:
            grads = gradients(ours, wrt)
    assert last == (backend or taken), what
    assert [(o.dtype, o.shape, o.requires_grad) for o in ours] == [(t.dtype, t.shape, t.requires_grad) for t in theirs]
    check(ours, theirs, theirs, what)
    if wrt:
        expected = gradients(theirs, wrt)
        check_grad(grads, expected, expected, f"{what}, gradient")


def tables() -> dict[str, str]:
    return {op.name(): torch._C._dispatch_dump_table(op.name()) for op, _, _ in _override._ops()}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = tables()
    yield
    assert _override._switch.count == 0 and tables() == before


@backends
@kinds
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("layout", [*LAYOUTS, "batch_first"])
def test_modules(kind: str, layers: int, layout: str, backend: str | None) -> None:
    for bidirectional, bias, given in itertools.product((False, True), repeat=3):
        options = {"bidirectional": bidirectional, "bias": bias, "batch_first": layout == "batch_first"}
        m = module_of(kind, 3, 5, layers, **options)
        x, hx, leaves = example(m, "dense" if layout == "batch_first" else layout)
        what = f"bidirectional={bidirectional} bias={bias} hx={given}"
        run = lambda m=m, x=x, h=hx if given else None: m(x, h)  # noqa: E701, E731
        same_as_torch(run, [*(leaves if given else leaves[:1]), *m.parameters()], what, backend)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                same_as_torch(run, [], f"{what} {mode.__name__}", backend)


@backends
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, backend: str | None) -> None:
    for bias, batched, given in itertools.product((False, True), repeat=3):
        m = module_of(kind, 3, 5, bias=bias)
        shape = (4,) if batched else ()
        leaves = [draw(*shape, 3), draw(*shape, 5), draw(*shape, 5)][: 3 if kind == "LSTMCell" else 2]
        hx = None if not given else tuple(leaves[1:]) if kind == "LSTMCell" else leaves[1]
        what, run = f"bias={bias} batched={batched} hx={given}", lambda m=m, x=leaves[0], hx=hx: m(x, hx)
        # One step with a gradient to come is left to torch by automatic choice.
        same_as_torch(run, [*(leaves if given else leaves[:1]), *m.parameters()], what, backend, taken="torch")
        with torch.no_grad():
            same_as_torch(run, [], what, backend)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(kind: str, dtype: torch.dtype) -> None:
    m = module_of(kind, 9, 24, 2, bidirectional=True, dtype=dtype)
    x, hx, leaves = example(m, "dense", T=6, B=5)
    truth, up = precise(m), [t.detach().double().requires_grad_() for t in leaves]
    exact = flat(truth(up[0], tuple(up[1:]) if isinstance(hx, tuple) else up[1]))
    theirs = flat(m(x, hx))
    with rnnkern.override():
        ours = flat(m(x, hx))
    check(ours, theirs, exact, "outputs")
    wrt = [*leaves, *m.parameters()]
    expected = gradients(exact, [*up, *truth.parameters()])
    check_grad(gradients(ours, wrt), gradients(theirs, wrt), expected, "gradients")


@kinds
def test_dropout_and_eval(kind: str) -> None:
    for layout in ("dense", "unsorted"):
        m = module_of(kind, 3, 5, 3, dropout=0.4, bidirectional=True)
        x, hx, leaves = example(m, layout)
        same_as_torch(lambda m=m, x=x, hx=hx: m(x, hx), [*leaves, *m.parameters()], layout)
        m.eval()
        same_as_torch(lambda m=m, x=x, hx=hx: m(x, hx), [*leaves, *m.parameters()], f"{layout}, eval")


@backends
@kinds
def test_second_derivatives(kind: str, backend: str | None) -> None:
    m = module_of(kind, 3, 4)
    x, hx, leaves = example(m, "dense", T=3, B=2)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(o.square().sum() for o in flat(m(x, hx))), leaves, create_graph=True)

    same_as_torch(run, [*leaves, *m.parameters()], backend=backend)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast(kind: str, packed: bool) -> None:
    m = module_of(kind, 6, 8, dtype=torch.float32)
    if kind in CELLS:
        x = torch.randn(4, 6)
    else:
        x = example(m, "packed" if packed else "dense", T=5, B=4)[0]
    has_lstm = torch_has_lstm(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with torch.backends.mkldnn.flags(enabled=has_lstm):
            theirs, truth = flat(m(x)), flat(precise(m)(x.to(torch.float64)))
        with rnnkern.override():
            result, last = last_after(lambda: m(x))
    ours = flat(result)
    torchs = has_lstm or packed or kind != "LSTM"
    dtypes = [t.dtype for t in theirs] if torchs else [torch.bfloat16] * 3
    assert last == AUTOMATIC and [o.dtype for o in ours] == dtypes
    check(ours, theirs, truth, dtype=torch.bfloat16)


class Own(nn.LSTM):
    """A class of somebody else's, on torch.nn's."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        y, state = super().forward(input * 2, hx)
        return y + 1, state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 4, 2, bidirectional=True), nn.GRU(8, 5, batch_first=True)
        self.cell = nn.LSTMCell(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(torch.relu(self.lstm(x)[0]))
        h, c = self.cell(y[0])
        return torch.tanh(h) + c


def test_a_subclass_and_a_plain_function() -> None:
    m, x = Own(3, 4).double(), draw(5, 2, 3)
    same_as_torch(lambda: m(x), [x, *m.parameters()])
    weights = [p.detach() for p in nn.GRU(3, 4).double().parameters()]
    same_as_torch(lambda: torch.gru(x, x.new_zeros(1, 2, 4), weights, True, 1, 0.0, False, False, False), [x])


def saved_and_loaded(m: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(m, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("made", ["script", "trace", "frozen"])
def test_torchscript(made: str) -> None:
    model, x = Model().double(), draw(5, 2, 3)
    if made == "trace":
        with rnnkern.override():  # what is recorded is torch's op
            traced = torch.jit.trace(model, x)
        assert "aten::lstm" in str(traced.lstm.graph)
        files = [traced, saved_and_loaded(traced)]
    else:
        scripted = torch.jit.script(model.eval())
        files = [scripted, saved_and_loaded(scripted)]
    if made == "frozen":
        files = [torch.jit.freeze(scripted), torch.jit.optimize_for_inference(scripted)]
    for m in files:
        for _ in range(3):  # the executor profiles, then optimizes
            parameters = list(m.parameters())
            # The cell comes last, and is left to torch where a gradient is to come.
            same_as_torch(lambda m=m: m(x), [x, *parameters], made, taken="torch")
            with torch.no_grad():
                same_as_torch(lambda m=m: m(x), [], made)


@kinds
def test_transforms_see_torchs_ops(kind: str) -> None:
    m = module_of(kind, 3, 4)
    x = draw(3, 2, 3).detach()

    def loss(v: Tensor) -> Tensor:
        return sum(o.square().sum() for o in flat(m(v)))  # type: ignore[return-value]

    for transform in (torch.func.grad, lambda f: torch.func.grad(lambda v: torch.func.grad(f)(v).sum())):
        same_as_torch(lambda t=transform: t(loss)(x), [], taken="torch")

    def message() -> str:
        with pytest.raises(RuntimeError) as error:
            torch.func.vmap(loss)(x.expand(2, 3, 2, 3))
        return str(error.value)

    theirs = message()
    with rnnkern.override():
        assert message() == theirs


@kinds
def test_forward_mode(kind: str) -> None:
    """The truth is torch's gradient, differentiated once more by its weights."""
    m = module_of(kind, 3, 4)
    x, v = draw(3, 2, 3), draw(3, 2, 3).detach()
    y = m(x)[0]
    w = torch.ones_like(y, requires_grad=True)
    (g,) = torch.autograd.grad(y, x, w, create_graph=True)
    (expected,) = torch.autograd.grad((g * v).sum(), w)  # the double-backward trick
    with rnnkern.override(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), v)
        found = torch.autograd.forward_ad.unpack_dual(m(dual)[0]).tangent
    check(found, expected, expected)


def test_checkpoint() -> None:
    m, x = module_of("GRU", 3, 4), draw(5, 2, 3)
    same_as_torch(lambda: checkpoint(lambda v: m(v)[0], x, use_reentrant=False), [x, *m.parameters()])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile(fullgraph: bool, inside: bool) -> None:
    """A graph with the ops in it has torch's; what Dynamo leaves out of graphs runs on rnnkern, and is not traced."""
    torch._dynamo.reset()
    m, x = module_of("GRU", 3, 4, dtype=torch.float32), draw(4, 2, 3, dtype=torch.float32)

    def plain(x: Tensor) -> Tensor:
        return torch.relu(m(x + 1)[0]) * 2

    def own(x: Tensor) -> Tensor:
        with rnnkern.override():
            return plain(x)

    theirs = [plain(x), *gradients([plain(x)], [x, *m.parameters()])]
    if fullgraph and inside:
        return  # a graph cannot contain the switch
    compiled = torch.compile(own if inside else plain, backend="aot_eager", fullgraph=fullgraph)
    with dynamo.patch(allow_rnn=fullgraph):
        for _ in range(2):
            with contextmanager(_nothing)() if inside else rnnkern.override():
                y, last = last_after(lambda: compiled(x))
                assert last == (None if fullgraph else AUTOMATIC)
            check([y, *gradients([y], [x, *m.parameters()])], theirs, theirs)
        if not inside:
            y, last = last_after(lambda: compiled(x))
            assert last is None
            check(y, theirs[0], theirs[0], "after")


def _nothing() -> Iterator[None]:
    yield


def test_errors_are_torchs() -> None:
    weights = [p.detach() for p in nn.LSTM(3, 4).parameters()]
    cell = [p.detach() for p in nn.GRUCell(3, 4).parameters()]
    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    options = (True, 1, 0.0, False, False, False)
    bad: list[Callable[[], Any]] = [
        lambda: torch.lstm(x, [h, h], weights[:3], *options),
        lambda: torch.lstm(x, [h], weights, *options),
        lambda: torch.lstm(x, [h, h[..., :2]], weights, *options),
        lambda: torch.lstm(x[..., :2], [h, h], weights, *options),
        lambda: torch.lstm(x[:0], [h, h], weights, *options),
        lambda: torch.lstm(x.double(), [h, h], weights, *options),
        lambda: torch.lstm(x[0, 0], [h, h], weights, *options),
        lambda: torch.lstm(x, [h, h], [w.sum() for w in weights], *options),
        lambda: torch.lstm(x, [h, h], [w.to("meta") for w in weights], *options),
        lambda: torch.lstm(x[0], torch.tensor([3]), [h, h], weights, True, 1, 0.0, False, False),
        lambda: torch.gru_cell(x[0], h[0], cell[0], cell[0], *cell[2:]),
        lambda: torch.gru_cell(x[0, :1], h[0], *cell),
        lambda: torch.gru_cell(x[0].int(), h[0], *cell),
    ]

    def message(run: Callable[[], Any]) -> tuple[str, str]:
        try:
            run()
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return type(error).__name__, str(error)
        return "none", ""

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            theirs = [message(run) for run in bad]
            with rnnkern.override():
                ours = [message(run) for run in bad]
            assert ours == theirs
    assert sum(kind != "none" for kind, _ in theirs) > 9


def test_what_rnnkern_refuses_runs_on_torch() -> None:
    x, h = draw(5, 1, 3), draw(1, 2, 4)
    weights = [p.detach() for p in nn.GRU(3, 4).double().parameters()]
    same_as_torch(lambda: torch.gru(x, h, weights, True, 1, 0.0, False, False, False), [x, h], taken="torch")
    wide = [w.to(torch.complex128) for w in weights]
    z = x.detach().to(torch.complex128)
    run = lambda: torch.gru_cell(z[0], z.new_zeros(1, 4), *wide)  # noqa: E731
    theirs = run()
    with rnnkern.override():
        found, last = last_after(run)
    assert last == "torch" and torch.equal(found, theirs)


def test_a_backend_asked_for_by_name_is_not_swapped() -> None:
    weights = [p.detach() for p in nn.GRU(3, 4).double().parameters()]
    x, h = draw(5, 1, 3), draw(1, 2, 4)
    with (
        rnnkern.override(),
        rnnkern.use_backend("reference"),
        pytest.raises(RuntimeError, match="Expected hidden size"),
    ):
        torch.gru(x, h, weights, True, 1, 0.0, False, False, False)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_rnnkerns_own_calls_of_torch_do_not_come_back(kind: str) -> None:
    """Its modules on torch's kernels: asked for, and by automatic choice for few steps with a gradient to come."""
    args = {**KINDS, **CELLS}[kind]
    m = getattr(rnnkern, kind.split()[0])(3, 5, dtype=torch.float64, **args)
    x = draw(2, 3) if kind in CELLS else draw(2, 2, 3)
    for backend in ("torch", None):
        with rnnkern.use_backend(backend):
            theirs = flat(m(x))
            with rnnkern.override():
                ours = flat(m(x))
                first = torch.autograd.grad(sum(o.square().sum() for o in ours), [x], create_graph=True)
                torch.autograd.grad(first[0].sum(), [x, *m.parameters()])
        check(ours, theirs, theirs)


def test_a_refusal_inside_a_kernel_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where rnnkern called torch's op in circumstances that the kernel judges differently."""
    m, x = module_of("GRU", 3, 4), draw(5, 2, 3)
    theirs = m(x)[0]
    monkeypatch.setattr(_override._call, "run", lambda *args: (lambda y, h: (y, (h,), ()))(*m(x)))
    with rnnkern.override():
        check(m(x)[0], theirs, theirs)


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_torchs_ops() -> None:
    m, x = module_of("LSTM", 3, 4), draw(2, 1, 3)
    with Names() as theirs:
        m(x)
    with rnnkern.override(), Names() as ours:
        m(x)
    assert ours.seen == theirs.seen


class Tagged(Tensor):
    pass


def test_tensor_subclasses_are_torchs() -> None:
    m, x = module_of("GRU", 3, 4), draw(2, 1, 3).detach().as_subclass(Tagged)
    theirs = m(x)[0]
    with rnnkern.override():
        (y, _), last = last_after(lambda: m(x))
    assert type(y) is type(theirs) is Tagged and last == "torch"
    check(y.as_subclass(Tensor), *[theirs.as_subclass(Tensor)] * 2)


def test_a_choice_on_a_gpu_gets_its_sizes() -> None:
    with FakeTensorMode():  # tensors of a GPU that is not there

        def on_gpu(module: nn.Module) -> list[Tensor]:
            return [torch.empty(w.shape, device="cuda") for w in module.parameters()]

        x = torch.empty(5, 3, 10, device="cuda")
        weights = on_gpu(nn.LSTM(10, 20, 2, bidirectional=True, proj_size=7, device="meta"))
        assert _override._sizes("lstm", x, weights, 2, True) == (10, 20, 2, 2, True)
        weights = on_gpu(nn.GRU(10, 20, device="meta"))
        assert _override._sizes("gru", x, weights, 1, False) == (10, 20, 1, 1, False)
        assert _override._sizes("gru", x, weights[:1], 1, False) is None
        assert _override._sizes("gru", torch.empty(5, 3, 10), weights, 1, False) is None


def test_only_the_keys_of_cpu_and_cuda_change() -> None:
    before = tables()
    ours = {"CPU", "AutogradCPU", "CUDA", "AutogradCUDA"}
    with rnnkern.override():
        for name, table in tables().items():
            pairs = zip(before[name].splitlines(), table.splitlines(), strict=True)
            changed = {a.partition(":")[0] for a, b in pairs if a != b}
            assert {"CPU", "AutogradCPU"} <= changed <= ours, name
        m = nn.LSTM(3, 4, device="meta")
        (y, _), last = last_after(lambda: m(torch.randn(5, 2, 3, device="meta")))
        assert y.shape == (5, 2, 4) and last is None


def test_counted() -> None:
    on = lambda: _override._switch.library is not None  # noqa: E731
    with pytest.raises(RuntimeError, match=r"disable\(\) without an enable\(\)"):
        rnnkern.override.disable()
    outer = rnnkern.override()
    with outer, outer, pytest.raises(KeyError), rnnkern.override():
        rnnkern.override.enable()
        rnnkern.override().disable()
        raise KeyError
    assert not on()
    rnnkern.override().enable()
    with rnnkern.override():
        assert on()
    assert on()
    rnnkern.override.disable()
    assert not on()


def test_a_failure_while_it_is_turned_on_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.library.Library.impl, itertools.count()

    def failing(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 5:
            raise MemoryError
        real(*args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", failing)
    with pytest.raises(MemoryError):
        rnnkern.override.enable()


def test_threads() -> None:
    """Calls from several threads while others turn it on and off; whichever kernel runs, the numbers are right."""
    m, x = module_of("GRU", 3, 4).requires_grad_(False), torch.randn(3, 2, 3, dtype=torch.float64)
    scripted = torch.jit.script(nn.Sequential(m))
    expected, stop, wrong = m(x)[0], threading.Event(), []

    def call(run: Callable[[Tensor], Any], grad: bool) -> None:
        try:
            with torch.set_grad_enabled(grad):
                while not stop.is_set():
                    check(run(x)[0], expected, expected)
        except BaseException as error:  # noqa: BLE001  for the main thread
            wrong.append(error)

    def toggle() -> None:
        try:
            for _ in range(150):
                with rnnkern.override():
                    check(m(x)[0], expected, expected)
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    callers = [threading.Thread(target=call, args=a) for a in itertools.product((m, scripted), (False, True))]
    togglers = [threading.Thread(target=toggle) for _ in range(3)]
    for thread in (*callers, *togglers):
        thread.start()
    for thread in togglers:
        thread.join()
    stop.set()
    for thread in callers:
        thread.join()
    assert not wrong


CHILD = """
import torch
names = [f"aten::{c}{s}" for c in ("rnn_tanh", "rnn_relu", "gru", "lstm") for s in (".input", ".data", "_cell")]
def state():
    tables = [torch._C._dispatch_dump_table(n) + torch._C._dispatch_dump(n) for n in names]
    keys = [k for k in torch.library._impls if k.startswith("aten/")]
    torch.manual_seed(0)
    m, x = torch.nn.LSTM(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    y = m(x)[0]
    y.sum().backward()
    numbers = y.tolist(), m.weight_hh_l0.grad.tolist(), torch.get_rng_state().tolist()
    return tables, keys, numbers, type(y.grad_fn).__name__
before = state()
import rnnkern
assert state() == before
for _ in range(2):
    with rnnkern.override():
        assert state() != before
    assert state() == before
print("the same")
"""


def test_a_process_is_as_it_was() -> None:
    command = [sys.executable, "-W", "error", "-c", CHILD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n" and not done.stderr  # no warning of torch's dispatcher reaches the user
