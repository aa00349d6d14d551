"""What the hidden units of a network do over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern.diagnostics import _picture
from rnnkern.diagnostics._flow import rows
from rnnkern.diagnostics._recorder import call, recording


@dataclass(frozen=True)
class StateMap:
    """What :func:`state_map` finds.

    Attributes:
        layers: `h` of every layer and direction by its name, `(L, H)`, by time.
    """

    layers: dict[str, Tensor]

    def draw(self, path: str | Path, labels: Sequence[str] | None = None) -> None:
        """A picture with a row for every unit and a column for every step. Needs matplotlib.

        Args:
            path: of the PNG file.
            labels: what is written below the steps, such as a text's characters.

        Units are sorted by the time at which they are largest, so that what they do is seen.
        """
        heights = [1 + 0.04 * h.shape[1] for h in self.layers.values()]
        figure = _picture.figure(9, min(9.0, 0.6 + sum(heights)))
        columns = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        bound = max(1.0, *(float(h.abs().max()) for h in self.layers.values()))  # relu has states above 1
        for axes, (name, h) in zip(columns, self.layers.items(), strict=True):
            units = h[:, h.abs().argmax(0).argsort()].t().float().cpu().numpy()
            extent = (0.5, len(h) + 0.5, h.shape[1] + 0.5, 0.5)  # the first step is 1
            image = axes.imshow(
                units, aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest", extent=extent
            )
            axes.set(ylabel="unit", yticks=[])
            axes.set_title(name, fontsize=9, loc="left")
        axes.set(xlabel="step t")
        if labels is not None:
            axes.set_xticks(range(1, len(labels) + 1), labels)
        figure.colorbar(image, ax=list(columns), label="h", fraction=0.03)
        _picture.save(figure, path)


def state_map(module: nn.Module, x: Any, row: int = 0) -> StateMap:
    """The hidden states of every recurrent layer over time, for one sequence of a batch.

    Args:
        module: a recurrent network or cell of torch.nn or rnnkern, or any model with some in it.
        x: what `module` is called with; a tuple: with several arguments.
        row: which sequence of the batch. Default: 0

    Returns:
        a :class:`StateMap`; ``draw(path)`` draws it.

    Raises:
        TypeError, ValueError: as :func:`gradient_flow`, but for the loss.
        IndexError: no such row.

    Example::

        >>> rnnkern.diagnostics.state_map(lstm, x).draw("states.png")
    """
    with torch.no_grad(), recording("state_map", module) as tracks:
        call(module, x)
        layers = {}
        for track in tracks:
            if track.states:
                h = torch.stack([rows(step[0]) for step in track.by_time()])
                if not -h.shape[1] <= row < h.shape[1]:
                    raise IndexError(f"state_map: row {row} of a batch of {h.shape[1]}")
                layers[track.name] = h[:, row]
    return StateMap(layers)
