"""Speech: is somebody speaking? Voice activity, frame by frame, in a stream.

Speech is synthesised after Klatt (1980): a buzz of vocal folds or a hiss through three resonances that glide from vowel
to vowel, in syllables, words and pauses, under noise as loud as the voice. A GRU learns to tell frames with voice from
frames without. Then it runs as it would on a microphone: rnnkern.Stream gets one frame of 10 ms at a time, keeps its
states, and answers before the next one comes. The baseline is the loudness of a frame, above its recording's mean, with
the threshold that is best in training.

    pip install -c constraints.txt -e '.[examples]' && python examples/voice.py

Frames right: 90.9 %; by loudness 68.5 %. Area under the ROC curve: 0.954; of loudness 0.729. A frame takes some 50
microseconds of its 10,000. 8 s of one core.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from common import BLUE, GREY, figure, options, save, train
from scipy.signal import lfilter
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import rnnkern

RATE, FRAME, BANDS = 8000, 80, 20  # Hz, samples in a frame of 10 ms, features of it
VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))  # Hz: a i u e o
WIDTHS = (80, 100, 140)  # Hz, of the three resonances
LENGTH, BATCH = 300, 8  # frames in a sequence


def syllable(chance: np.random.Generator) -> np.ndarray:
    """A hiss and a vowel that glides into another, 120 to 300 ms."""
    count = int(chance.uniform(0.12, 0.3) * RATE)
    start, end = (np.array(VOWELS[chance.integers(len(VOWELS))]) * chance.uniform(0.9, 1.15) for _ in range(2))
    pitch = chance.uniform(90, 230) * np.linspace(1, chance.uniform(0.85, 1.1), count)
    buzz = (np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) > 0).astype(float)
    hissing = int(count * chance.uniform(0.0, 0.3))
    buzz[:hissing] = 0.1 * chance.standard_normal(hissing)
    sound = np.empty(count)
    pieces = np.array_split(np.arange(count), 8)
    states = [np.zeros(2) for _ in WIDTHS]
    for k, piece in enumerate(pieces):
        part = buzz[piece]
        for r, (a, b, width) in enumerate(zip(start, end, WIDTHS, strict=True)):
            pole = np.exp(-np.pi * width / RATE + 2j * np.pi * (a + (b - a) * k / 7) / RATE)
            feedback = [1, -2 * pole.real, abs(pole) ** 2]
            part, states[r] = lfilter([sum(feedback)], feedback, part, zi=states[r])
        sound[piece] = part
    return sound / max(np.sqrt(np.mean(sound**2)), 1e-9) * np.hanning(count) ** 0.3


def recording(chance: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound [frames * FRAME] and whether there is voice in each frame [frames]."""
    voice = np.zeros(frames * FRAME)
    at = int(chance.uniform(0, 0.8) * RATE)
    while at < len(voice):
        for _ in range(chance.integers(1, 5)):  # a word
            sound = syllable(chance)[: max(0, len(voice) - at)]
            voice[at : at + len(sound)] = sound
            at += len(sound)
        at += int(chance.uniform(0.15, 1.0) * RATE)
    color = chance.uniform(-0.9, 0.6)  # noise that rumbles or hisses, and swells
    noise = lfilter([1], [1, color], chance.standard_normal(len(voice)))
    seconds = np.arange(len(voice) // RATE + 2)
    swell = np.exp(np.interp(np.arange(len(voice)) / RATE, seconds, chance.normal(0, 0.7, len(seconds))))
    noise *= swell / np.sqrt(np.mean((noise * swell) ** 2))
    spoken = (voice.reshape(frames, FRAME) ** 2).mean(1) > 1e-3
    return chance.uniform(0.3, 3) * (voice + noise), spoken


def features(sound: np.ndarray) -> np.ndarray:
    """Logarithms of the power in bands that widen with frequency, of a frame and the one before it [frames, BANDS]."""
    frames = sound.reshape(-1, FRAME)
    pairs = np.concatenate([np.concatenate([np.zeros((1, FRAME)), frames[:-1]]), frames], 1)
    power = np.abs(np.fft.rfft(pairs * np.hanning(2 * FRAME))) ** 2
    edges = np.unique(np.geomspace(2, power.shape[1], BANDS + 1).round().astype(int))
    bands = [power[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.log(np.stack(bands, 1) + 1e-6).astype(np.float32)


class Detector(nn.Module):
    def __init__(self, bands: int, hidden: int = 48) -> None:
        super().__init__()
        self.rnn = rnnkern.GRU(bands, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:  # [T, N, bands] -> logits [T, N]
        return self.head(self.rnn(x)[0]).squeeze(-1)


def loudness(sound: np.ndarray) -> np.ndarray:
    levels = np.log((sound.reshape(-1, FRAME) ** 2).mean(1))
    return levels - levels.mean()


def area(score: np.ndarray, truth: np.ndarray) -> float:
    """Under the ROC curve: how often a frame with voice has the higher score than one without."""
    return float(roc_auc_score(truth, score))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=400, out="voice.png")
    chance = np.random.default_rng(args.seed)
    made = [recording(chance, LENGTH) for _ in range(min(200, 8 + args.steps))]
    x = torch.tensor(np.stack([features(sound) for sound, _ in made], 1))  # [T, recordings, bands]
    y = torch.tensor(np.stack([spoken for _, spoken in made], 1)).float()
    mean, spread = x.mean(), x.std()
    model = Detector(x.shape[2])

    def loss() -> Tensor:
        pick = torch.randint(x.shape[1], (BATCH,))
        return binary_cross_entropy_with_logits(model((x[:, pick] - mean) / spread), y[:, pick])

    train(model, loss, args.steps, 5e-3)

    sound, spoken = recording(chance, 3000)  # half a minute that it never heard
    heard = (torch.tensor(features(sound)) - mean) / spread
    stream, answers = rnnkern.Stream(model.rnn), []
    started = time.perf_counter()
    with torch.inference_mode():
        for frame in heard:
            answers.append(model.head(stream.step(frame[None])).item())
    taken = 1e6 * (time.perf_counter() - started) / len(heard)
    score = np.array(answers)
    loud = loudness(sound)
    levels = [(loudness(s), v) for s, v in made]
    cuts = np.quantile(np.concatenate([level for level, _ in levels]), np.linspace(0.02, 0.98, 97))
    cut = max(cuts, key=lambda c: np.mean([np.mean((level > c) == v) for level, v in levels]))
    ours, theirs = float(np.mean((score > 0) == spoken)), float(np.mean((loud > cut) == spoken))
    print(f"frames right: {ours:.1%}; by loudness: {theirs:.1%}; always the more frequent: "
          f"{max(spoken.mean(), 1 - spoken.mean()):.1%}")  # fmt: skip
    print(f"area under the ROC curve: {area(score, spoken):.3f}; of loudness: {area(loud, spoken):.3f}")
    print(f"a frame of 10,000 microseconds took {taken:.0f} microseconds")

    picture, (above, below) = figure(9, 3.8, nrows=2, ncols=1, sharex=True)
    show, t = slice(0, 600), np.arange(600) / 100
    above.specgram(sound[: 600 * FRAME], NFFT=160, noverlap=80, Fs=RATE, cmap="Greys")
    above.set(ylabel="Hz")
    below.fill_between(t, spoken[show], step="post", color=GREY, alpha=0.35, linewidth=0, label="voice")
    below.plot(t, 1 / (1 + np.exp(-score[show])), color=BLUE, label="GRU's probability of voice")
    below.set(xlabel="seconds", ylim=(0, 1.25), xlim=(0, 6))
    below.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)
    save(picture, args.out)
    return {"gru": ours, "loudness": theirs, "microseconds": taken}


if __name__ == "__main__":
    main()
