"""What the examples share, so that each can be about its one thing: options, a progress bar, padding, pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

BLUE, ORANGE, GREEN, GREY = "#1f4e79", "#f2a65a", "#4f9d69", "#888888"


def options(doc: str | None, given: list[str] | None, *, steps: int, out: str, **switches: str) -> argparse.Namespace:
    """The command line of an example; `switches` are its own, with what they do. Seeds torch, and sets its threads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; for small networks one is best")
    parser.add_argument("--out", type=Path, default=Path(out), help="the picture (default: %(default)s)")
    for name, does in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=does)
    args = parser.parse_args(given)
    if args.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {args.steps}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    learning_rate: float = 3e-3,
    title: str = "training",
    clip: float = 1.0,
) -> list[float]:
    """Adam with a learning rate that falls along a cosine, gradients clipped; the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with tqdm(total=steps, unit="step", desc=title, dynamic_ncols=True) as bar:
        for step in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            bar.update()
    return losses


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token numbers as one tensor [L, N] with padding below, and their lengths [N]."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, padding_value=value), torch.tensor([len(row) for row in rows])


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Random picks out of `count` things, for ever."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(count, (size,), generator=draw).tolist()


@torch.no_grad()
def greedy(model: Any, source: Tensor, lengths: Tensor, begin: int, end: int, most: int) -> tuple[Tensor, Any]:
    """What a rnnkern.seq2seq.Seq2Seq writes when it takes the likeliest token at every step: [T, N], `end` after the
    end; and the attention weights [T, N, L]."""
    state = model.start(source, lengths)
    token = torch.full((source.shape[1],), begin)
    done = torch.zeros(source.shape[1], dtype=torch.bool)
    written, weights = [], []
    for _ in range(most):
        logits, state = model.decoder.step(token, state)
        token = logits.argmax(-1).masked_fill(done, end)
        done |= token == end
        written.append(token)
        weights.append(state.weights)
        if done.all():
            break
    return torch.stack(written), None if weights[0] is None else torch.stack(weights)


def figure(width: float, height: float, **subplots: Any) -> tuple[Any, Any]:
    """A picture and its axes in one style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(**subplots)
    for one in axes.flat if hasattr(axes, "flat") else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)
    return made, axes


def save(picture: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
    print(f"picture: {path}")


def draw_attention(text: str, written: str, weights: Tensor, out: Path, height: float) -> None:
    """The weights [T, L] with which each written character looked at those of the text."""
    picture, axes = figure(8, height)
    axes.imshow(weights, cmap="Blues", aspect="auto", vmin=0, vmax=1)
    axes.set_xticks(range(len(text)), text)
    axes.set_yticks(range(len(written)), written)
    axes.set(ylabel="written", xlabel="read")
    axes.set_title("where the decoder looks for every character that it writes", fontsize=10, loc="left")
    save(picture, out)
