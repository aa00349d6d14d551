"""Reinforcement learning with a memory: sb3-contrib's RecurrentPPO, its loop over time replaced by one call.

CartPole with its velocities masked, so that one observation does not tell which way the pole falls. A minibatch holds
parts of several episodes, and where an episode begins the LSTM's state has to start anew: sb3-contrib steps through
the minibatch in Python for that. rnnkern.LSTM takes the mask as `reset`, and everything else stays as it is:

    pip install -c constraints.txt -e '.[clients,demo]' && python examples/recurrent_ppo.py

trains both with one seed, side by side, and draws their learning curves over steps and over the time that they took.
The losses are the same but for rounding. In time that changes an action that was drawn, and from there on the two are
two runs of the same learning.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

import rnnkern

States = tuple[Tensor, Tensor]


class OneCallPolicy(RecurrentActorCriticPolicy):
    """sb3-contrib's recurrent policy on rnnkern."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rnnkern.accelerate(self)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: rnnkern.LSTM
    ) -> tuple[Tensor, States]:
        sequences = lstm_states[0].shape[1]
        x = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
        reset = episode_starts.reshape(sequences, -1).t() > 0
        y, lstm_states = lstm(x, lstm_states, reset=reset)
        return y.transpose(0, 1).flatten(0, 1), lstm_states


class PositionsOnly(gymnasium.ObservationWrapper):
    """CartPole without what a memory has to find out."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation * np.array([1, 0, 1, 0], observation.dtype)


def environments(count: int, seed: int) -> VecEnv:
    return make_vec_env("CartPole-v1", count, seed, wrapper_class=PositionsOnly)


class TimedPPO(RecurrentPPO):
    """RecurrentPPO that notes how long its updates take and what they find."""

    seconds = 0.0

    def train(self) -> None:
        start = time.perf_counter()
        super().train()
        self.seconds += time.perf_counter() - start

    def losses(self) -> dict[str, float]:
        """Of the latest update."""
        return {name: float(value) for name, value in self.logger.name_to_value.items() if "loss" in name}


def learner(policy: type[RecurrentActorCriticPolicy], seed: int = 0, hidden: int = 64, **options: Any) -> TimedPPO:
    """64 units, 8 environments, 128 steps, 10 epochs."""
    rollout = {"n_steps": 128, "n_epochs": 10, "batch_size": 128}
    given = {**rollout, "gamma": 0.95, "gae_lambda": 0.8, "learning_rate": 3e-3, **options}
    kwargs = {"lstm_hidden_size": hidden, "net_arch": [64], "ortho_init": False}
    return TimedPPO(policy, environments(8, seed), seed=seed, device="cpu", policy_kwargs=kwargs, **given)


@dataclass
class Curve:
    """What one learner did, update by update."""

    name: str
    model: TimedPPO
    seconds: list[float] = field(default_factory=list)  # since the start, this learner's own time
    rewards: list[float] = field(default_factory=list)  # of the latest 100 episodes, on average
    losses: list[dict[str, float]] = field(default_factory=list)

    def update(self) -> None:
        """One rollout and one update on it."""
        start = time.perf_counter()
        rollout = self.model.n_steps * self.model.n_envs
        self.model.learn(rollout, reset_num_timesteps=not self.rewards, log_interval=None)
        before = self.seconds[-1] if self.seconds else 0.0
        self.seconds.append(before + time.perf_counter() - start)
        self.rewards.append(float(np.mean([episode["r"] for episode in self.model.ep_info_buffer])))
        self.losses.append(self.model.losses())


def race(updates: int, seed: int = 0, progress: bool = True, **options: Any) -> list[Curve]:
    """Both policies in turns, so that a busy machine is as busy for one as for the other."""
    from tqdm import tqdm

    policies = {"sb3-contrib": RecurrentActorCriticPolicy, "on rnnkern": OneCallPolicy}
    curves = [Curve(name, learner(policy, seed, **options)) for name, policy in policies.items()]
    with tqdm(total=updates, unit="update", disable=not progress) as bar:
        for _ in range(updates):
            for curve in curves:
                torch.manual_seed(seed + len(curve.rewards))  # actions are drawn from the one generator of all
                np.random.seed(seed + len(curve.rewards))
                curve.update()
            bar.set_postfix({curve.name: f"reward {curve.rewards[-1]:.0f}" for curve in curves})
            bar.update()
    return curves


def report(curves: list[Curve]) -> str:
    theirs, ours = curves
    first = max(abs(ours.losses[0][name] - value) / max(abs(value), 1e-6) for name, value in theirs.losses[0].items())
    lines = [f"{curve.name:12} {curve.model.seconds:6.1f} s in train(), {curve.seconds[-1]:6.1f} s in all, "
             f"reward at the end {curve.rewards[-1]:.0f}" for curve in curves]  # fmt: skip
    lines.append(f"train() is {theirs.model.seconds / ours.model.seconds:.1f} times as fast; the losses of the first")
    lines.append(f"update differ by {first:.1e} of their size, which is rounding")
    return "\n".join(lines)


def draw(curves: list[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for curve in curves:
        steps = np.arange(1, len(curve.rewards) + 1) * curve.model.n_steps * curve.model.n_envs
        by_step.plot(steps, curve.rewards, label=curve.name)
        by_time.plot(curve.seconds, curve.rewards, label=curve.name)
    by_step.set(xlabel="steps of the environments", ylabel="reward, mean of 100 episodes", title="by experience")
    by_time.set(xlabel="seconds", title="by time")
    by_step.legend()
    figure.suptitle("RecurrentPPO on CartPole with velocities masked")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[Curve]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=25, help="of 1024 steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; these networks are too small for more")
    parser.add_argument("--out", type=Path, default=Path("recurrent_ppo.png"))
    parser.add_argument("--small", action="store_true", help="two short updates of a small network, for a test")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    options = {"hidden": 8, "n_steps": 16, "n_epochs": 2} if args.small else {}
    curves = race(2 if args.small else args.updates, args.seed, progress=not args.small, **options)
    print(report(curves))
    draw(curves, args.out)
    print(f"learning curves: {args.out}")
    return curves


if __name__ == "__main__":
    main()
