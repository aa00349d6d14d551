"""Every kind of bad input that DESIGN.md lists raises, with torch.nn's own type and message where it has one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern

SEQUENCES = [k for k in KINDS if k != "RNN relu"]
T, B, I, H = 5, 2, 3, 4
X = torch.zeros(T, B, I)


def module(namespace: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(namespace, kind.split()[0])(*(args or (I, H)), **{**{**KINDS, **CELLS}[kind], **kwargs})


def error(run: Callable[[], Any]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011  what is raised is what the test compares
        run()
    return type(caught.value), str(caught.value)


def assert_same_error(kind: str, *arguments: Any) -> None:
    theirs, ours = module(torch.nn, kind), module(rnnkern, kind)
    assert error(lambda: ours(*arguments)) == error(lambda: theirs(*arguments))


def states(kind: str, *shape: int, **kwargs: Any) -> Any:
    """hx of one shape, as a tuple for an LSTM."""
    if not kind.startswith("LSTM"):
        return torch.zeros(*shape, **kwargs)
    proj = (*shape[:-1], 2) if kind == "LSTM proj" and shape[-1] == H else shape
    return torch.zeros(*proj, **kwargs), torch.zeros(*shape, **kwargs)


@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_size": 0},
        {"hidden_size": -3},
        {"input_size": 0},
        {"input_size": -1},
        {"hidden_size": 2.5},
        {"input_size": "3"},
        {"num_layers": 0},
        {"num_layers": -2},
        {"dropout": -0.1},
        {"dropout": 1.1},
        {"dropout": True},
        {"dropout": "much"},
        {"bias": 1},
        {"batch_first": "no"},
        {"proj_size": H},
        {"proj_size": H + 1},
        {"proj_size": -1},
        {"nonlinearity": "sine"},
        {"colour": "red"},
    ],
    ids=str,
)
def test_constructor(kind: str, arguments: dict[str, Any]) -> None:
    """The constructors are inherited: what torch.nn raises is raised, and what it lets pass is built."""

    def build(namespace: Any) -> Any:
        options = {"input_size": I, "hidden_size": H, **{**KINDS, **CELLS}[kind], **arguments}
        return getattr(namespace, kind.split()[0])(**options)

    try:
        build(torch.nn)
    except Exception as theirs:
        message = str(theirs).replace("torch.nn.modules.rnn", "rnnkern.nn")
        assert error(lambda: build(rnnkern)) == (type(theirs), message)
    else:
        build(rnnkern)


INPUTS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "rank 1": lambda kind: (X[0, 0],),
    "rank 4": lambda kind: (X[None],),
    "features": lambda kind: (X[..., :2],),
    "features, unbatched": lambda kind: (X[:, 0, :2],),
    "integers": lambda kind: (X.long(),),
    "bool": lambda kind: (X.bool(),),
    "complex": lambda kind: (X.to(torch.complex64),),
    "float64": lambda kind: (X.double(),),
    "bfloat16": lambda kind: (X.bfloat16(),),
    "no steps": lambda kind: (X[:0],),
    "input device": lambda kind: (X.to("meta"),),
    "input device with states": lambda kind: (X.to("meta"), states(kind, 1, B, H)),
    "state device": lambda kind: (X, states(kind, 1, B, H, device="meta")),
    "state batch": lambda kind: (X, states(kind, 1, B + 1, H)),
    "state layers": lambda kind: (X, states(kind, 2, B, H)),
    "state width": lambda kind: (X, states(kind, 1, B, H + 1)),
    "state rank 2": lambda kind: (X, states(kind, B, H)),
    "state rank 3, unbatched": lambda kind: (X[:, 0], states(kind, 1, B, H)),
    "state layers, unbatched": lambda kind: (X[:, 0], states(kind, 3, H)),
    "a list": lambda kind: ([1.0, 2.0],),
    "None": lambda kind: (None,),
    "state is text": lambda kind: (X, "ab"),
}


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("case", INPUTS)
def test_call(kind: str, case: str) -> None:
    arguments = INPUTS[case](kind)
    assert_same_error(kind, *arguments)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
@pytest.mark.parametrize("shape", [(1, B + 1, H), (2, B, H), (1, B, H + 1), (B, H)])
def test_packed_states(kind: str, shape: tuple[int, ...]) -> None:
    packed = pack_padded_sequence(X, torch.tensor([5, 2]))
    assert_same_error(kind, packed, torch.zeros(shape))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_packed_states_that_torch_does_not_see(kind: str) -> None:
    """An unsorted batch's states: torch cuts a batch that is too large without a word; LSTM checks nothing."""
    for lengths in ([2, 5], [5, 2]):
        packed = pack_padded_sequence(X, torch.tensor(lengths), enforce_sorted=False)
        with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(1, 2, \d\), got \[1, 3, \d\]"):
            module(rnnkern, kind)(packed, states(kind, 1, B + 1, H))
    with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(1, 2, \d\), got \[2, \d\]"):
        module(rnnkern, kind)(packed, states(kind, B, H))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_number_of_states(kind: str, grad: bool) -> None:
    """Three, of which two would do; and one of them None, which is not zeros."""
    x, h = (X, torch.zeros(1, B, H)) if kind == "LSTM" else (X[0], torch.zeros(B, H))
    with torch.set_grad_enabled(grad):
        for given in ((h, h, h), (h,), (h, None), (None, h)):
            assert_same_error(kind, x, given)


@pytest.mark.parametrize("grad", [False, True])
def test_number_of_reset_states(grad: bool) -> None:
    lstm, h = rnnkern.LSTM(I, H), torch.zeros(1, B, H)
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match="reset_state expects two hidden states"):
            lstm(X, reset=MASK, reset_state=(h, h, h))
        for given in ((h, None), (None, h)):
            with pytest.raises(AttributeError, match="NoneType"):
                lstm(X, reset=MASK, reset_state=given)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_dtypes_that_differ(kind: str) -> None:
    """torch gives what happens to break first ("get_mkldnn_dtype: unsupported data type"); the type is the same."""
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype, found .*float32.*float64"):
        module(rnnkern, kind)(X, states(kind, 1, B, H, dtype=torch.float64))
    mixed = module(rnnkern, kind)
    mixed.weight_hh_l0 = torch.nn.Parameter(mixed.weight_hh_l0.double())
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not the same dtype"):
        mixed(X)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("kind", SEQUENCES)
def test_dtypes_that_only_torch_has(kind: str, backend: str) -> None:
    """Complex networks run on torch's own kernel; a scan backend asked for by name says that it cannot."""
    theirs, ours = (module(n, kind).to(torch.complex64) for n in (torch.nn, rnnkern))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, dtype=torch.complex64)
    assert torch.equal(ours(x)[0], theirs(x)[0]) and rnnkern.dispatch.last() == "torch"
    with rnnkern.use_backend(backend), pytest.raises(RuntimeError, match=f"{backend!r} was asked for .*complex64"):
        ours(x)


CELL_INPUTS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "rank": lambda kind: (X,),
    "rank 0": lambda kind: (X[0, 0, 0],),
    "features": lambda kind: (X[0, :, :2],),
    "features, unbatched": lambda kind: (X[0, 0, :2],),
    "state rank": lambda kind: (X[0], states(kind, 1, B, H)),
    "state width": lambda kind: (X[0], states(kind, B, H + 1)),
    "state batch": lambda kind: (X[0], states(kind, B + 1, H)),
    "state of one row": lambda kind: (X[0], states(kind, H)),
    "state of a batch": lambda kind: (X[0, 0], states(kind, B, H)),
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("case", CELL_INPUTS)
def test_cell_call(kind: str, case: str) -> None:
    arguments = CELL_INPUTS[case](kind)
    assert_same_error(kind, *arguments)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", ["MGUCell", "IndRNNCell", "LiGRUCell", "SLSTMCell"])
def test_call_of_a_cell_that_torch_does_not_have(kind: str, gradient: bool) -> None:
    """In the words of the one of torch's that has its form."""
    theirs, cell = "LSTMCell" if kind == "SLSTMCell" else "GRUCell", getattr(rnnkern, kind)(I, H).eval()
    for case, arguments in CELL_INPUTS.items():
        given = arguments(theirs)
        raised, words = error(lambda given=given: module(torch.nn, theirs)(*given))
        if kind == "SLSTMCell":
            given = (given[0], *(h + h for h in given[1:]))  # four states
        with torch.set_grad_enabled(gradient):
            assert error(lambda given=given: cell(*given)) == (raised, words.replace(theirs, kind)), case
        with pytest.raises(RuntimeError, match=f"{kind}: input and weights must have the same dtype"):
            cell(X[0].double())


@pytest.mark.parametrize("kind", CELLS)
def test_cell_dtypes_and_devices(kind: str) -> None:
    """Where torch says "mat1 and mat2 must have the same dtype", of tensors that the caller has never seen."""
    cell = module(rnnkern, kind)
    for x in (X[0].double(), X[0].long()):
        with pytest.raises(RuntimeError, match=f"input and weights must have the same dtype, but got {x.dtype} and"):
            cell(x)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        cell(X[0], states(kind, B, H, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="not at the same device, found input tensor at meta"):
        cell(X[0].to("meta"))
    with pytest.raises(RuntimeError, match="found input tensor at cpu and hidden tensor at meta"):
        cell(X[0], states(kind, B, H, device="meta"))
    if kind == "LSTMCell":
        for c in (torch.zeros(B + 1, H), torch.zeros(B, H + 1)):
            assert_same_error(kind, X[0], (torch.zeros(B, H), c))
    if kind == "RNNCell":
        for m in (torch.nn.RNNCell(I, H), cell):
            m.nonlinearity = "sine"
            with pytest.raises(RuntimeError, match="Unknown nonlinearity: sine"):
                m(X[0])


def test_sorting_of_packed_sequences() -> None:
    """pack_padded_sequence is torch's; an unsorted batch or an empty sequence never reaches a module."""
    with pytest.raises(RuntimeError, match="must be sorted in decreasing order"):
        rnnkern.LSTM(I, H)(pack_padded_sequence(X, torch.tensor([2, 5])))
    with pytest.raises(RuntimeError, match="greater than 0"):
        rnnkern.LSTM(I, H)(pack_padded_sequence(X, torch.tensor([5, 0])))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ([2, 2, 2], "expected a sum of 10, the rows of the packed input, got 6"),
        ([2, 2, 2, 2, 2, 2], "expected a sum of 10, the rows of the packed input, got 12"),
        ([2, 3, 2, 2, 1], "never grow"),
        ([4, 4, 2, 0], "positive"),
        ([6, 5, -1], "positive"),
        ([], "sequence length to be larger than 0"),
    ],
)
def test_batch_sizes(sizes: list[int], message: str) -> None:
    """A PackedSequence made by hand; kernels trust what passes here."""
    with pytest.raises((ValueError, RuntimeError), match=message):
        rnnkern.GRU(I, H)(PackedSequence(X.reshape(10, I), torch.tensor(sizes, dtype=torch.int64)))


def test_batch_sizes_of_another_kind() -> None:
    for sizes in (torch.tensor([5.0, 5.0]), torch.tensor([[5, 5]]), torch.tensor([5, 5], dtype=torch.int32)):
        with pytest.raises(ValueError, match="batch_sizes: expected a 1-D int64 tensor on the CPU"):
            rnnkern.functional.gru(X.reshape(10, I), None, list(torch.nn.GRU(I, H).parameters()), batch_sizes=sizes)


LENGTHS: dict[str, tuple[Any, str]] = {
    "too long": (torch.tensor([6, 2]), r"expected values from 0 to the 5 steps of the input, got \[6, 2\]"),
    "negative": (torch.tensor([3, -1]), r"expected values from 0 to the 5 steps of the input, got \[3, -1\]"),
    "too many": (torch.tensor([3, 2, 1]), r"one per batch row, shape \(2,\), got \(3,\)"),
    "rank": (torch.tensor([[3, 2]]), r"shape \(2,\), got \(1, 2\)"),
    "floats": (torch.tensor([3.0, 2.0]), "expected integers, got torch.float32"),
    "bools": (torch.tensor([True, False]), "expected integers, got torch.bool"),
    "a list of floats": ([3.5, 2.0], "expected integers, got torch.float32"),
    "a list too long": ([6, 2], "expected values from 0 to the 5 steps"),
    "empty": ([], r"shape \(2,\), got \(0,\)"),
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_lengths(kind: str, case: str) -> None:
    given, message = LENGTHS[case]
    with pytest.raises(ValueError, match=f"lengths: .*{message}"):
        module(rnnkern, kind)(X, lengths=given)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("given", [3, {5, 2}, [5, None], ["5", "2"]], ids=str)
def test_lengths_that_are_none(given: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="lengths: expected integers, one per batch row"):
        rnnkern.LSTM(I, H)(X, lengths=given)


def test_lengths_where_there_can_be_none() -> None:
    with pytest.raises(ValueError, match="lengths: not with a packed input"):
        rnnkern.GRU(I, H)(pack_padded_sequence(X, torch.tensor([5, 2])), lengths=[5, 2])
    with pytest.raises(ValueError, match="lengths: not with an unbatched input"):
        rnnkern.GRU(I, H)(X[:, 0], lengths=[5])


MASK = torch.zeros(T, B, dtype=torch.bool)
RESETS: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"reset": MASK[:3]}, r"reset: expected one value per row of the input, shape .*5, 2.*, got .*3, 2"),
    "transposed": ({"reset": MASK.t()}, r"reset: .*shape .*5, 2.*, got .*2, 5"),
    "rank": ({"reset": MASK[..., None]}, "reset: .*shape"),
    "floats": ({"reset": MASK.float()}, "reset: expected a bool mask, got torch.float32"),
    "integers": ({"reset": MASK.long()}, "reset: expected a bool mask, got torch.int64"),
    "a list": ({"reset": MASK.tolist()}, "reset: expected a bool mask, a tensor, got list"),
    "device": ({"reset": MASK.to("meta")}, "reset: expected on the input's device cpu, got meta"),
    "state alone": ({"reset_state": 1}, "reset_state: only together with reset"),
    "state batch": ({"reset": MASK, "reset_state": (1, 3, H)}, r"shape \(1, 2 or 1, 4\) as hx, got \(1, 3, 4\)"),
    "state layers": ({"reset": MASK, "reset_state": (2, B, H)}, r"shape \(1, 2 or 1, 4\) as hx, got \(2, 2, 4\)"),
    "packed mask": (
        {"reset": pack_padded_sequence(MASK, torch.tensor([5, 2]))},
        "reset: expected the container of the input, got a PackedSequence with a Tensor input",
    ),
}


@pytest.mark.parametrize("case", RESETS)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_reset(kind: str, case: str) -> None:
    options, message = RESETS[case]
    if "reset_state" in options:
        shape = options["reset_state"]
        options = {**options, "reset_state": states(kind, *(shape if isinstance(shape, tuple) else (1, 1, H)))}
    with pytest.raises(ValueError, match=message):
        module(rnnkern, kind)(X, **options)


def test_reset_of_a_packed_input() -> None:
    gru, packed = rnnkern.GRU(I, H), pack_padded_sequence(X, torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="got a Tensor with a PackedSequence input"):
        gru(packed, reset=MASK)
    for lengths in ([5, 3], [2, 5]):
        other = pack_padded_sequence(MASK, torch.tensor(lengths), enforce_sorted=False)
        with pytest.raises(ValueError, match="batch sizes and indices of the input"):
            gru(packed, reset=other)
    with pytest.raises(RuntimeError, match="Input and reset_state tensors are not the same dtype"):
        gru(X, reset=MASK, reset_state=torch.zeros(1, 1, H, dtype=torch.float64))


def weights(kind: str = "LSTM", **options: Any) -> list[Tensor]:
    return list(module(torch.nn, kind, **options).parameters())


@pytest.mark.parametrize(
    "params, options, message",
    [
        (weights()[:3], {}, "got an incorrect number of RNN parameters: expected 4 .* 1 layers x 1 directions, got 3"),
        (weights(), {"num_layers": 2}, "incorrect number of RNN parameters: .* 2 layers x 1 directions, got 4"),
        (weights(), {"bias": False}, "incorrect number of RNN parameters"),
        ([], {}, "incorrect number of RNN parameters: .* got 0"),
        ([w.t() for w in weights()], {}, "weight_ih_l0 and weight_hh_l0: expected"),
        ([weights()[1], *weights()[1:]], {}, "input.size.-1. must be equal to input_size. Expected 4, got 3"),
        ([weights()[0], weights()[0], *weights()[2:]], {}, r"weight_hh_l0: expected shape \[16, 4\], got \[16, 3\]"),
        ([*weights()[:3], weights()[3][:5]], {}, r"bias_hh_l0: expected shape \[16\], got \[5\]"),
        ([*weights(), *weights()], {"num_layers": 2}, r"weight_ih_l1: expected shape \[16, 4\], got \[16, 3\]"),
        ([*weights(), *weights()[:2], *weights()[:2]], {"bidirectional": True}, "bias_ih_l0_reverse: expected shape"),
        ([*weights("LSTM proj")[:4], torch.zeros(3, H)], {}, r"weight_hr_l0: expected shape \[2, 4\], got \[3, 4\]"),
    ],
)
def test_weights(params: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        rnnkern.functional.lstm(X, None, params, **options)


def test_backends() -> None:
    known = re.escape("expected one of triton, cpp, numba, reference, torch")
    with pytest.raises(ValueError, match=f"unknown backend 'fortran': {known}"):
        rnnkern.use_backend("fortran")
    with rnnkern.use_backend("torch"):
        for options in ({"lengths": [5, 2]}, {"reset": MASK}, {"return_states": True}):
            named = f"'torch' was asked for and cannot do this call: {next(iter(options))}="
            with pytest.raises(RuntimeError, match=named):
                rnnkern.LSTM(I, H)(X, **options)


def test_autocast_does_not_hide_a_wrong_device() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="not at the same device"):
        rnnkern.GRU(I, H)(X, torch.zeros(1, B, H, device="meta"))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_out_of_memory_names_the_size(kind: str, backend: str) -> None:
    """More than any address space holds; the input itself is one number seen many times."""
    x = torch.zeros(1, 1, 1).expand(2**40, 2**12, 1)
    with rnnkern.use_backend(backend), torch.no_grad(), pytest.raises(RuntimeError, match="allocate.* [0-9]{15,}"):
        module(rnnkern, kind, 1, H)(x)


def test_weights_of_a_cell_that_do_not_fit() -> None:
    """Replaced by hand: a kernel would read beyond them."""
    for name, shape in (("weight_ih", (6, 3)), ("weight_hh", (11, 4)), ("bias_ih", (5,)), ("bias_hh", (13,))):
        for grad in (True, False):
            cell = rnnkern.GRUCell(3, 4)
            setattr(cell, name, torch.nn.Parameter(torch.zeros(shape)))
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=rf"{name}: expected shape \[12"):
                cell(torch.randn(2, 3))
