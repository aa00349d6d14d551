"""The main job: one character language model trained twice, with torch.nn's layer and with rnnkern's, side by side.

Both start from the same weights and see the same batches; they take turns step by step, so that noise on the machine
hits both alike. What comes out: which backend ran, held-out losses and their difference, characters per second, a
sample and a chart. The command fails where the two trainings part by more than rounding explains (:func:`allowed`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import rnnkern
from rnnkern import demo_report, dispatch

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
HELD_OUT = 0.05  # the last twentieth of the text, never trained on
CHECKS = 12  # times that the held-out loss is taken on the way
LEARNING_RATE = 3e-3
CLIP = 1.0  # norm of all gradients together
FP16_SCALE = 1024.0  # lifts the loss, so that small gradients do not vanish in fp16; taken out before the update
PROMPT, SAMPLE, TEMPERATURE = 32, 400, 0.7


class Parted(Exception):
    """The two trainings differ by more than rounding explains."""


@dataclass
class Text:
    name: str
    alphabet: str
    train: Tensor  # [characters] int64
    held: Tensor

    def batches(self, steps: int, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops (input, target), both [length, batch]; the same ones for the same seed."""
        draw = torch.Generator().manual_seed(seed)
        span = torch.arange(length + 1, device=self.train.device)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - length, (batch,), generator=draw).to(self.train.device)
            crops = self.train[span[:, None] + starts]
            yield crops[:-1], crops[1:]

    def prompt(self) -> Tensor:
        """What a sample goes on from: the first sentence of the held-out text to begin, or its first characters."""
        words = self.decode(self.held.tolist())
        end = words.find(". ", 0, max(0, len(words) - PROMPT))
        start = end + 2 if end >= 0 else 0
        return self.held[start : start + PROMPT]

    def decode(self, indices: list[int]) -> str:
        return "".join(self.alphabet[index] for index in indices)


def read_text(path: str | None, length: int, device: torch.device) -> Text:
    """The user's file, or the language reference that Python carries for its own help().

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is too short to train on crops of this length.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ValueError(
                "this Python came without pydoc_data.topics: give a text of your own with --text"
            ) from error
        name, characters = "pydoc_data.topics", "\n".join(topics[key] for key in sorted(topics))
    else:
        try:
            name, characters = path, Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read --text {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    needed = math.ceil((length + 1) / HELD_OUT)
    if len(characters) < needed:
        raise ValueError(
            f"{name} has {len(characters)} characters; with --length {length} at least {needed} are needed"
        )
    alphabet = "".join(sorted(set(characters)))
    index = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([index[character] for character in characters], device=device)
    held = int(len(data) * HELD_OUT)
    return Text(name, alphabet, data[:-held], data[-held:])


class CharacterModel(nn.Module):
    """Embedding, recurrent layers, and one linear layer to the next character's logits."""

    def __init__(self, rnn: nn.RNNBase, characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, rnn.input_size)
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, characters)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:  # x [T, B]
        y, state = self.rnn(self.embedding(x), state)
        return self.head(y), state


class Optimizer:
    """Adam on fp32 copies of 16-bit weights, which are too coarse to take small steps in; else on the weights."""

    def __init__(self, model: nn.Module):
        self.weights = list(model.parameters())
        dtype = self.weights[0].dtype
        self.coarse = dtype.itemsize < 4
        self.scale = FP16_SCALE if dtype == torch.float16 else 1.0
        self.masters = [w.detach().float() for w in self.weights] if self.coarse else self.weights
        self.adam = torch.optim.Adam(self.masters, lr=LEARNING_RATE)

    def step(self) -> None:
        if self.coarse:
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.grad = weight.grad.float() / self.scale if weight.grad is not None else None
        nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.adam.step()
        if self.coarse:
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


@dataclass
class Run:
    """One of the two trainings."""

    name: str
    model: CharacterModel
    optimizer: Optimizer = field(init=False)
    losses: list[float] = field(default_factory=list)  # of each step's batch
    seconds: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # after each of the checks
    generated: float = 0.0  # characters per second
    backend: str | None = None

    def __post_init__(self) -> None:
        self.optimizer = Optimizer(self.model)

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        logits, _ = self.model(x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(wide.flatten(0, 1), target.flatten())

    def gradients(self, x: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x, target)
        (loss * self.optimizer.scale).backward()
        return loss.detach()

    def step(self, x: Tensor, target: Tensor) -> None:
        started = clock(x.device)
        loss = self.gradients(x, target)
        self.optimizer.step()
        self.seconds.append(clock(x.device) - started)
        self.losses.append(float(loss))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def held_out_loss(model: CharacterModel, held: Tensor, batch: int, length: int) -> float:
    """Nats per character over all of the held-out text, read as parallel streams whose state is carried along."""
    columns = max(1, min(batch, len(held) // (length + 1)))
    streams = held[: len(held) // columns * columns].view(columns, -1).t()  # [T, columns]
    total, state = 0.0, None
    for start in range(0, len(streams) - 1, length):
        part = streams[start : start + length + 1]
        logits, state = model(part[:-1], state)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        total += float(cross_entropy(wide.flatten(0, 1), part[1:].flatten(), reduction="sum"))
    return total / ((len(streams) - 1) * columns)


@torch.no_grad()
def generate(model: CharacterModel, prompt: Tensor, count: int, seed: int) -> tuple[list[int], float]:
    """Sampled characters, one call with T=1 for each, and how many came out in a second."""
    draw = torch.Generator().manual_seed(seed)
    logits, state = model(prompt[:, None])
    out: list[int] = []
    started = clock(prompt.device)
    for _ in range(count):
        odds = torch.softmax(logits[-1, 0].double() / TEMPERATURE, 0).cpu()
        out.append(int(torch.multinomial(odds, 1, generator=draw)))
        logits, state = model(torch.tensor([[out[-1]]], device=prompt.device), state)
    return out, count / (clock(prompt.device) - started)


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The relative spacing of numbers that products are computed in."""
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return 2.0**-10
    return torch.finfo(dtype).eps


def allowed(step: int, loss: float, eps: float) -> float:
    """How far the held-out losses may lie apart after so many steps, in nats per character.

    Two correct kernels add in different orders, so their trainings start `eps` apart, and training multiplies a
    difference: torch.nn against itself, one copy's weights moved by one rounding, was seen to double every eight steps
    at the fastest and to level off at 0.005 (fp32 and bf16, three cells, batches of 2 to 16, 600 steps). The
    bound is that curve with four times its level. Before that happens, and where it cannot, :func:`same_gradients`
    and the exchange of weights in :func:`exchanged` are the sharper tests.
    """
    return min(0.02, 16 * eps * loss * 2.0 ** min(step / 8, 64.0))


def same_gradients(theirs: Run, ours: Run, x: Tensor, target: Tensor, eps: float) -> None:
    """Before the first step, both must give the same loss and gradients; also compiles and warms up both.

    Seen apart by five eps of a gradient's norm at most, in four dtypes, three cells, one and two layers, T=200.
    """
    losses = [run.gradients(x, target).item() for run in (theirs, ours)]
    ours.backend = dispatch.last()
    if not abs(losses[0] - losses[1]) <= 32 * eps * losses[0]:
        raise Parted(f"the first batch's loss is {losses[0]:.7g} with {theirs.name}, {losses[1]:.7g} with {ours.name}")
    pairs = zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True)
    for (name, expected), got in pairs:
        if expected.grad is None or got.grad is None:
            raise Parted(f"{name} got no gradient from {ours.name if got.grad is None else theirs.name}")
        want = expected.grad.double()
        off = float((got.grad.double() - want).norm() / want.norm().clamp_min(torch.finfo(torch.float64).tiny))
        if not off <= 32 * eps:
            raise Parted(f"the first gradient of {name} differs by {off:.1e} of its norm (allowed {32 * eps:.1e})")
    for run in (theirs, ours):
        run.optimizer.zero_grad()


def exchanged(theirs: Run, ours: Run, held: Tensor, batch: int, length: int, eps: float) -> float:
    """The held-out loss of our trained weights, loaded into torch's module: how far it lies from our own."""
    theirs.model.load_state_dict(ours.model.state_dict())
    loss = held_out_loss(theirs.model, held, batch, length)
    off = abs(loss - ours.held[-1])
    if not off <= 32 * eps * loss:
        raise Parted(
            f"the same trained weights give {ours.held[-1]:.7g} with {ours.name}, {loss:.7g} with {theirs.name}"
        )
    return off


def train(theirs: Run, ours: Run, text: Text, args: argparse.Namespace, eps: float) -> list[int]:
    """Both trainings, taking turns at each step and going first by turns; the steps at which held-out loss was taken.

    Raises:
        Parted: a loss is not finite, or the two differ by more than :func:`allowed`.
    """
    checks = sorted({round(args.steps * (i + 1) / CHECKS) for i in range(CHECKS)} - {0})
    batches = enumerate(text.batches(args.steps, args.batch, args.length, args.seed), 1)
    with tqdm(batches, total=args.steps, unit="step", desc="training both", dynamic_ncols=True) as bar:
        for step, (x, target) in bar:
            for run in (theirs, ours) if step % 2 else (ours, theirs):
                run.step(x, target)
            if step not in checks:
                continue
            for run in (theirs, ours):
                run.held.append(held_out_loss(run.model, text.held, args.batch, args.length))
                if not math.isfinite(run.held[-1]):
                    raise Parted(f"the held-out loss of {run.name} is {run.held[-1]} after {step} steps")
            apart, bound = abs(theirs.held[-1] - ours.held[-1]), allowed(step, theirs.held[-1], eps)
            bar.set_postfix_str(f"held-out {theirs.held[-1]:.3f} and {ours.held[-1]:.3f}")
            if apart > bound:
                raise Parted(
                    f"after {step} steps the held-out loss is {theirs.held[-1]:.6f} with {theirs.name} and "
                    f"{ours.held[-1]:.6f} with {ours.name}: {apart:.1e} apart, allowed {bound:.1e}"
                )
    return checks


def positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=CELLS, default="lstm", help="which module to train (default: %(default)s)")
    for name, default, help in (
        ("hidden", 256, "units of a layer, and of the embedding"),
        ("layers", 1, "recurrent layers"),
        ("batch", 16, "sequences in a batch"),
        ("length", 64, "characters in a sequence"),
        ("steps", 500, "training steps"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{help} (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and states (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to learn (default: the language reference in Python)"
    )
    parser.add_argument("--out", type=Path, default=Path("rnnkern-demo.png"), help="the chart (default: %(default)s)")


def chart_reason(out: Path) -> str | None:
    """Why no chart can be drawn, or None; asked before the training, not after it.

    Raises:
        ValueError: `out` cannot be a picture.
    """
    if not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.resolve().parent}")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected a name that ends in .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    return None


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu or cuda")
    return device


def main(args: argparse.Namespace) -> int:
    """Runs the demo; the exit status: 0, 1 if the two trainings part.

    Raises:
        ValueError: an option asks for what is not there.
    """
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    no_chart = chart_reason(args.out)
    text = read_text(args.text, args.length, device)
    eps = rounding(dtype, device)
    name = CELLS[args.cell]
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} thread{'s'[: threads != 1]}"
    title = (
        f"{name}, {args.layers} x {args.hidden} units, batches of {args.batch} x {args.length} characters, "
        f"{args.dtype} on {device} ({where})"
    )
    print(f"Character language model: {title}")
    print(f"Text: {text.name}, {len(text.train) + len(text.held):,} characters, {len(text.alphabet)} different ones")
    if no_chart:
        print(f"There will be no chart: {no_chart}")

    torch.manual_seed(args.seed)
    models = []
    for kind in (getattr(nn, name), getattr(rnnkern, name)):
        rnn = kind(args.hidden, args.hidden, args.layers)
        models.append(CharacterModel(rnn, len(text.alphabet)).to(device, dtype))
    models[1].load_state_dict(models[0].state_dict())
    theirs, ours = Run(f"torch.nn.{name}", models[0]), Run(f"rnnkern.{name}", models[1])

    try:
        first = next(text.batches(1, args.batch, args.length, args.seed))
        same_gradients(theirs, ours, *first, eps)
        print(f"Backend that ran {ours.name}: {ours.backend}", flush=True)
        checks = train(theirs, ours, text, args, eps)
        prompt = text.prompt()
        for run in (theirs, ours):
            generate(run.model, prompt, 4, args.seed)  # the first call with T=1 may compile
            sample, run.generated = generate(run.model, prompt, SAMPLE, args.seed)
        off = exchanged(theirs, ours, text.held, args.batch, args.length, eps)
    except Parted as parted:
        print(f"\nFAILED, torch.nn and rnnkern do not agree: {parted}", flush=True)
        return 1

    bound = allowed(args.steps, theirs.held[-1], eps)
    print(f"\n{demo_report.table(theirs, ours, args.batch * args.length, bound, off)}")
    print(f"\nWhat {ours.name} writes after {text.decode(prompt.tolist())!r}:\n")
    print("\n".join(f"    {line}" for line in text.decode(sample).splitlines()))
    if no_chart is None:
        demo_report.draw(theirs, ours, args.batch * args.length, checks, title, args.out)
        print(f"\nChart: {args.out}")
    return 0
