"""Programs that use torch's recurrent networks, as they are and on rnnkern: ``python -m benchmarks.clients``.

Each is taken from its Python package (``pip install '.[clients]'``) and not edited: it runs under rnnkern.override(),
or its model is given to rnnkern.accelerate(). tests/test_clients.py holds the results against torch's; here they are
timed, in interleaved rounds of one process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rnnkern
from benchmarks import machine
from benchmarks.clocks import HostClock
from benchmarks.problem import Unavailable, imported
from benchmarks.results import RESULTS, Row, append, constants

ROUNDS = 15
BATCH = 0.02  # s; a side's share of a round is as many calls as fill this
COLUMNS = ("date", "commit", "machine", "cpu", "torch", "threads", "client", "version", "what", "time_us",
           "peer_time_us", "ratio", "ratio_p20", "ratio_p80")  # fmt: skip


@dataclass
class Measurement:
    """Two ways to do the same, each a call and the context it runs in."""

    client: str
    what: str
    mine: Callable[[], Any]
    theirs: Callable[[], Any]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # of mine


# ---- silero-vad: voice activity by a TorchScript model, a frame at a time -------------------------------------------

RATE, FRAME = 16000, 512


def speech(seconds: float = 4.0) -> Tensor:
    """Vowels of a gliding voice: pulses of the vocal cords through resonances of the mouth, in syllables and pauses."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(int(seconds * RATE)) / RATE
    pitch = 110 + 25 * torch.sin(2 * torch.pi * 0.8 * t)
    phase = torch.cumsum(2 * torch.pi * pitch / RATE, 0)
    syllable = (torch.sin(2 * torch.pi * 3.2 * t).clamp(min=0)) * (torch.sin(2 * torch.pi * 0.4 * t) > -0.3)
    first, second = 500 + 250 * torch.sin(2 * torch.pi * 1.6 * t), 1500 + 500 * torch.sin(2 * torch.pi * 1.1 * t)
    voice = torch.zeros_like(t)
    for k in range(1, 36):
        mouth = sum(1 / (1 + ((k * pitch - centre) / 90) ** 2) for centre in (first, second, 2600.0))
        voice += mouth * torch.sin(k * phase) / k**0.5
    return 0.3 * syllable * voice + 0.002 * torch.randn(len(t), generator=generator)


def silero() -> Any:
    """Its model for TorchScript."""
    return imported("silero_vad").load_silero_vad(onnx=False)


def probabilities(model: Any, signal: Tensor) -> Tensor:
    """Of speech, for every frame of 32 ms."""
    model.reset_states()
    with torch.no_grad():
        return torch.cat([model(frame[None], RATE)[0] for frame in signal.unfold(0, FRAME, FRAME)])


def voice_activity() -> Iterator[Measurement]:
    model, frame = silero(), speech(1.0)[:FRAME]

    def one() -> None:
        with torch.no_grad():
            model(frame, RATE)

    yield Measurement("silero-vad", "a frame of 32 ms", one, one, rnnkern.override)
    weights = [w for name, w in model.named_parameters() if name.startswith("_model.decoder.rnn")]
    x, hx = torch.randn(1, weights[0].size(1)), tuple(torch.randn(2, 1, weights[1].size(1)))

    def cell() -> None:
        with torch.no_grad():
            torch.lstm_cell(x, hx, *weights)

    yield Measurement("silero-vad", "its LSTM cell, of such a frame", cell, cell, rnnkern.override)


# ---- sb3-contrib: reinforcement learning with a recurrent policy -----------------------------------------------------


def recurrent_ppo(seed: int = 0, hidden: int = 64, **options: Any) -> Any:
    given = {"n_steps": 64, "batch_size": 32, "n_epochs": 2} | options
    policy = {"lstm_hidden_size": hidden}
    make = imported("sb3_contrib").RecurrentPPO
    return make("MlpLstmPolicy", "CartPole-v1", seed=seed, device="cpu", policy_kwargs=policy, **given)


def policy_training() -> Iterator[Measurement]:
    theirs, mine = recurrent_ppo(), recurrent_ppo()
    rnnkern.accelerate(mine.policy)

    def learn(model: Any) -> Callable[[], Any]:
        return lambda: model.learn(64, reset_num_timesteps=False)

    yield Measurement("sb3-contrib", "RecurrentPPO, 64 steps and 2 epochs on them", learn(mine), learn(theirs))


# ---- GluonTS: forecasts with DeepAR ----------------------------------------------------------------------------------


class Forecaster:
    """DeepAR on a daily curve with noise."""

    def __init__(self, epochs: int, folder: Path | str, **options: Any) -> None:
        module, dataset = imported("gluonts.torch"), imported("gluonts.dataset.common")
        imported("lightning.pytorch")
        generator = torch.Generator().manual_seed(0)
        hours = torch.arange(400)
        target = 10 + 3 * torch.sin(2 * torch.pi * hours / 24) + 0.3 * torch.randn(400, generator=generator)
        self.data = dataset.ListDataset([{"start": "2024-01-01", "target": target.numpy()}], freq="h")
        quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
        given = {"hidden_size": 40, "num_layers": 2, "num_batches_per_epoch": 10, "batch_size": 32} | options
        self.estimator = module.DeepAREstimator(
            freq="h", prediction_length=24, context_length=48, dropout_rate=0.0, **given,
            trainer_kwargs={"max_epochs": epochs, "default_root_dir": str(folder), **quiet},
        )  # fmt: skip

    def train(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.estimator.train(self.data)

    def samples(self, predictor: Any) -> Tensor:
        (forecast,) = predictor.predict(self.data)
        return torch.from_numpy(forecast.samples)


def forecasting() -> Iterator[Measurement]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        forecaster = Forecaster(1, folder)
        yield Measurement("gluonts", "DeepAR, an epoch of 10 batches", forecaster.train, forecaster.train,
                          rnnkern.override)  # fmt: skip
        predictor = forecaster.train()

        def predict() -> None:
            forecaster.samples(predictor)

        yield Measurement("gluonts", "DeepAR, a forecast of 24 hours", predict, predict, rnnkern.override)


# ---- Opacus: gradients of every sample, for differential privacy ----------------------------------------------------


class Tagger(torch.nn.Module):
    """A recurrent network and a linear layer on its last output."""

    def __init__(self, lstm: torch.nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.lstm = lstm
        self.head = torch.nn.Linear(lstm.hidden_size, classes)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def taggers(features: int, hidden: int) -> tuple[Tagger, Tagger]:
    """On Opacus's LSTM, and an accelerated one, with the same weights."""
    layers = imported("opacus.layers")
    torch.manual_seed(0)
    ours = Tagger(torch.nn.LSTM(features, hidden, batch_first=True))
    theirs = Tagger(layers.DPLSTM(features, hidden, batch_first=True))
    theirs.lstm.load_state_dict(ours.lstm.state_dict())
    theirs.head.load_state_dict(ours.head.state_dict())
    rnnkern.accelerate(ours)
    return theirs, ours


def loss_of(model: Tagger) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        found = torch.func.functional_call(model, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(found, y[None])

    return loss


def per_sample(model: Tagger, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What Opacus wants as ``grad_sample``, by torch.func: its grad_sample_mode "no_op"."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(loss_of(model)), (None, 0, 0))(parameters, x, y)


def by_opacus(model: Any, x: Tensor, y: Tensor) -> None:
    """Leaves them in ``grad_sample`` of a model that Opacus has wrapped."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y, reduction="sum").backward()


def private_gradients() -> Iterator[Measurement]:
    theirs, ours = taggers(128, 128)
    wrapped = imported("opacus").GradSampleModule(theirs, loss_reduction="sum")
    x, y = torch.randn(64, 50, 128), torch.randint(3, (64,))
    yield Measurement("opacus", "gradients of 64 samples, LSTM T=50 H=128", lambda: per_sample(ours, x, y),
                      lambda: by_opacus(wrapped, x, y))  # fmt: skip


CLIENTS = {
    "silero-vad": voice_activity,
    "sb3-contrib": policy_training,
    "gluonts": forecasting,
    "opacus": private_gradients,
}


def timed(one: Measurement) -> Row:
    """Median times of both, and of the ratio within a round."""
    clock, counts, mine, theirs = HostClock(), [], [], []
    sides = ((one.theirs, contextlib.nullcontext, theirs), (one.mine, one.context, mine))
    for call, context, _ in sides:
        with context():
            call()
            counts.append(max(1, round(BATCH / clock.seconds(call, 1))))
    for _ in range(ROUNDS):
        for (call, context, found), count in zip(sides, counts, strict=True):
            with context():
                clock.ready(call)
                found.append(clock.seconds(call, count))
    ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
    p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
    return {
        "client": one.client,
        "version": version(one.client),
        "what": one.what,
        "time_us": f"{1e6 * statistics.median(mine):.5g}",
        "peer_time_us": f"{1e6 * statistics.median(theirs):.5g}",
        "ratio": f"{statistics.median(ratios):.4g}",
        "ratio_p20": f"{p20:.4g}",
        "ratio_p80": f"{p80:.4g}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--client", nargs="*", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--out", type=Path, help="appended to; default: benchmarks/results/clients/<machine>.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    out = args.out or RESULTS / "clients" / f"{machine.machine()}.csv"
    shared = {name: value for name, value in constants(args.threads).items() if name in COLUMNS}
    ran = 0
    for name in args.client:
        try:
            for one in CLIENTS[name]():
                row = shared | timed(one)
                print(f"{name}, {one.what}: {row['time_us']} us, as it is {row['peer_time_us']} us: {row['ratio']}")
                append(out, row, COLUMNS)
                ran += 1
        except Unavailable as reason:
            print(f"{name}: {reason}")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
