"""The loops of :func:`rnnkern.generate` in Python. Mirrors csrc/generate.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rnnkern._generate_model import Options, Steps, refusal

Result = tuple[Tensor, Tensor, Tensor | None]


def rows(steps: Steps, prompt: Tensor, lengths: Tensor, state: Any, o: Options, uniform: Tensor | None) -> Result:
    """Greedy, or drawn by `uniform` [N, most]."""
    N, L = prompt.shape
    tokens = torch.full((N, o.most), o.pad, device=prompt.device)
    counts = torch.zeros_like(lengths)
    alive = torch.ones(N, dtype=torch.bool, device=prompt.device)
    stops = torch.tensor(o.stops, dtype=torch.int64, device=prompt.device)
    token, at = prompt[:, 0], torch.arange(N, device=prompt.device)
    for t in range(L + o.most - 1):
        if not alive.any():
            break
        logits, state = _step(steps, token, state, o)
        if t + 1 < L:
            token = prompt[:, t + 1].clone()
        chosen = at[alive & (t + 1 >= lengths)]
        if not len(chosen):
            continue
        found = logits[chosen]
        _check(found, chosen.tolist(), counts[chosen].tolist())
        if uniform is None:
            new = found.argmax(-1)
        else:
            new = _drawn(found, uniform[chosen, counts[chosen]], o)
        tokens[chosen, counts[chosen]] = new
        counts[chosen] += 1
        alive[chosen] = ~torch.isin(new, stops) & (counts[chosen] < o.most)
        token = token.clone()
        token[chosen] = new
    return tokens, counts, None


def _step(steps: Steps, token: Tensor, state: Any, o: Options) -> tuple[Tensor, Any]:
    logits, state = steps.step(token, state)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != len(token):
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"generate: expected logits of shape [{len(token)}, V], got {what}")
    if not logits.is_floating_point():
        raise ValueError(f"generate: expected logits in floating point, got {logits.dtype}")
    o.check_vocabulary(logits.shape[1])
    return logits, state


def _check(logits: Tensor, numbers: list[int], counts: list[int]) -> None:
    """`numbers`: the rows whose logits these are; `counts`: how many new tokens each has."""
    peak = logits.amax(-1)
    bad = ~peak.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise RuntimeError(refusal(numbers[i], counts[i], float(peak[i])))


def _drawn(logits: Tensor, uniform: Tensor, o: Options) -> Tensor:
    """By inversion of the distribution function, over the tokens in the order of their numbers."""
    logits = logits.double()
    scaled = (logits - logits.amax(-1, keepdim=True)) / o.temperature
    odds = scaled.exp()
    if o.top_k is not None or o.top_p < 1:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        best = odds.gather(-1, order)
        if o.top_k is not None:
            best[:, o.top_k :] = 0
        before = best.cumsum(-1) - best
        best = best.where(before < o.top_p * best.sum(-1, keepdim=True), 0)
        odds = torch.zeros_like(odds).scatter_(-1, order, best)
    below = odds.cumsum(-1)
    drawn = torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True).squeeze(-1)
    last = (odds > 0).long().cumsum(-1).argmax(-1)  # a product that rounds up to all of it
    return torch.minimum(drawn, last)


def beams(steps: Steps, prompt: Tensor, lengths: Tensor, state: Any, o: Options, uniform: Tensor | None) -> Result:
    """Beam search; row n has the steps' rows from n * K on, of which the first ones are alive."""
    (N, L), K, device = prompt.shape, o.beams, prompt.device
    every = torch.arange(N, device=device).repeat_interleave(K)
    state, token = steps.select(state, every), prompt[every, 0]
    searches, begins = [Search(o) for _ in range(N)], [length - 1 for length in lengths.tolist()]
    for t in range(L + o.most - 1):
        if all(search.over for search in searches):
            break
        logits, state = _step(steps, token, state, o)
        read, parents = prompt[every, min(t + 1, L - 1)].tolist(), list(range(N * K))
        for n, search in enumerate(searches):
            if search.over or t < begins[n]:
                continue
            alive = len(search.beams)
            found = logits[n * K : n * K + alive]
            _check(found, [n] * alive, [t - begins[n]] * alive)
            search.advance(found.double().log_softmax(-1).cpu())
            for i, (beam, parent) in enumerate(zip(search.beams, search.parents, strict=True)):
                parents[n * K + i], read[n * K + i] = n * K + parent, beam[1][-1]
        token, state = torch.tensor(read, device=device), steps.select(state, torch.tensor(parents, device=device))
    tokens = torch.full((N, o.most), o.pad, device=device)
    for n, search in enumerate(searches):
        tokens[n, : len(search.best)] = torch.tensor(search.best, device=device)
    counts = torch.tensor([len(search.best) for search in searches], dtype=torch.int64, device=device)
    return tokens, counts, torch.tensor([search.score for search in searches], dtype=torch.float64, device=device)


class Search:
    """The beams of one row, best first: log-probability and tokens of each; and the best that has ended."""

    def __init__(self, options: Options) -> None:
        self.o, self.length, self.over = options, 0, False
        self.beams: list[tuple[float, list[int]]] = [(0.0, [])]
        self.parents = [0]
        self.best: list[int] = []
        self.score = -math.inf

    def _normalised(self, total: float, length: int) -> float:
        return total / length**self.o.penalty

    def _offer(self, total: float, tokens: list[int]) -> None:
        score = self._normalised(total, len(tokens))
        if score > self.score:
            self.score, self.best = score, tokens

    def advance(self, odds: Tensor) -> None:
        """One token more; odds [alive, V] are log-probabilities."""
        o, V = self.o, odds.shape[1]
        totals = torch.tensor([total for total, _ in self.beams], dtype=torch.float64)
        ranked = (totals[:, None] + odds).flatten().sort(descending=True, stable=True)
        reached = o.beams * (1 + len(o.stops))  # among these are enough that do not end
        kept: list[tuple[float, list[int]]] = []
        parents = []
        pairs = zip(ranked.values[:reached].tolist(), ranked.indices[:reached].tolist(), strict=True)
        for rank, (total, index) in enumerate(pairs):
            parent, token = divmod(index, V)
            if total == -math.inf or len(kept) == o.beams:
                break
            tokens = [*self.beams[parent][1], token]
            if token not in o.stops:
                kept.append((total, tokens))
                parents.append(parent)
            elif rank < o.beams:
                self._offer(total, tokens)
        self.beams, self.parents, self.length = kept, parents, self.length + 1
        if self.length == o.most:
            for total, tokens in kept:
                self._offer(total, tokens)
            self.over = True
        elif not kept or self.score >= self._within_reach(kept[0][0]):
            self.over = True

    def _within_reach(self, total: float) -> float:
        """The highest score that a beam can still get: by ending next, or by adding certain tokens to the end."""
        return max(self._normalised(total, self.length + 1), self._normalised(total, self.o.most))
