"""What :func:`rnnkern.generate` asks of a model: one step, and the state of chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rnnkern.beyond import MGU, SLSTM, IndRNN, LiGRU
from rnnkern.convert import PAIRS
from rnnkern.seq2seq import Decoder, DecoderState, Seq2Seq

RECURRENT = (
    *(kind for pair in PAIRS for kind in pair if not issubclass(kind, nn.RNNCellBase)),
    *(MGU, IndRNN, LiGRU, SLSTM),
)


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`rnnkern.generate` that say how tokens are chosen."""

    most: int
    sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    beams: int
    penalty: float
    stops: tuple[int, ...]
    pad: int

    def check_vocabulary(self, V: int) -> None:
        if V < 1:
            raise ValueError("generate: the vocabulary is empty: the model gives no logits")
        if any(stop >= V for stop in self.stops):
            raise ValueError(f"generate: eos_token_id must lie in [0, {V - 1}], got {list(self.stops)}")


class Steps:
    """A function of tokens and state."""

    def __init__(self, step: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> None:
        self._function = step

    def check(self, prompt: Tensor, state: Any, options: Options) -> None:
        """Refuses what can be refused before the first step."""

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits `(N, V)` of tokens `(N)`, and the state after them."""
        found = self._function(token, state)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"generate: expected the model to return logits and a state, got {type(found).__name__}")
        return found

    def select(self, state: Any, rows: Tensor) -> Any:
        """The state of these rows, in this order."""
        if state is None:
            return None
        if isinstance(state, Tensor):
            if state.dim() < 2:
                raise ValueError("generate: beam search expects tensors of a state to have the batch in dimension 1")
            return state.index_select(1, rows)
        if isinstance(state, dict):
            return {name: self.select(part, rows) for name, part in state.items()}
        if isinstance(state, (tuple, list)):
            parts = [self.select(part, rows) for part in state]
            return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
        if callable(getattr(state, "index_select", None)):
            return state.index_select(rows)
        raise TypeError(f"generate: beam search cannot choose rows of a {type(state).__name__}: it has no index_select")


class Network(Steps):
    """Embedding, recurrent network and head."""

    def __init__(self, embedding: Any, rnn: nn.RNNBase, head: Any) -> None:
        self.embedding, self.rnn, self.head = embedding, rnn, head
        # How many tokens can be read, and how many there are to choose from, where that is known.
        self.reads: int | None = None
        self.writes = head.out_features if isinstance(head, nn.Linear) else None
        width = None
        if embedding is None:
            self.reads = width = rnn.input_size
        elif isinstance(embedding, nn.Linear):
            self.reads, width = embedding.in_features, embedding.out_features
        elif isinstance(embedding, nn.Embedding):
            self.reads, width = embedding.num_embeddings, embedding.embedding_dim
        elif not callable(embedding):
            raise TypeError(f"generate: expected an embedding or None, got {type(embedding).__name__}")
        if not callable(head):
            raise TypeError(f"generate: expected a head, got {type(head).__name__}")
        if width not in (None, rnn.input_size):
            raise ValueError(f"generate: the embedding gives {width} features, the network reads {rnn.input_size}")
        if rnn.bidirectional:
            raise ValueError("generate: the network is bidirectional: it reads what is not yet written")
        out = rnn.proj_size or rnn.hidden_size
        if isinstance(head, nn.Linear) and head.in_features != out:
            raise ValueError(f"generate: the head reads {head.in_features} features, the network gives {out}")

    def check(self, prompt: Tensor, state: Any, options: Options) -> None:
        if self.writes is not None:
            options.check_vocabulary(self.writes)
        if self.reads is None:
            return
        if self.writes is not None and self.writes > self.reads:
            raise ValueError(f"generate: the head gives {self.writes} tokens, the embedding reads {self.reads}")
        check_prompt(prompt, self.reads)

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rnn(self._embedded(token).unsqueeze(1 if self.rnn.batch_first else 0), state)
        return self.head(y.squeeze(1 if self.rnn.batch_first else 0)), state

    def _embedded(self, token: Tensor) -> Tensor:
        if self.embedding is not None and not isinstance(self.embedding, nn.Linear):
            return self.embedding(token)
        like = self.rnn.weight_ih_l0 if self.embedding is None else self.embedding.weight
        hot = nn.functional.one_hot(token, self.reads).to(like.dtype)  # type: ignore[arg-type]
        return hot if self.embedding is None else self.embedding(hot)


class Written(Steps):
    """A :class:`rnnkern.seq2seq.Decoder`, whose state is a DecoderState."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.step)
        self.decoder, self.embedding, self.rnn, self.head = decoder, decoder.embedding, decoder.rnn, decoder.head
        self.reads = self.embedding.num_embeddings

    def check(self, prompt: Tensor, state: Any, options: Options) -> None:
        options.check_vocabulary(self.reads)
        check_prompt(prompt, self.reads)


def check_prompt(prompt: Tensor, reads: int) -> None:
    if prompt.numel() and not (0 <= int(prompt.min()) and int(prompt.max()) < reads):
        raise IndexError(f"generate: the prompt's tokens must lie in [0, {reads - 1}]")


def steps_of(model: Any, state: Any) -> tuple[Steps, Any]:
    """The model and the state before its first step."""
    if isinstance(model, Decoder):
        if not isinstance(state, DecoderState):
            raise TypeError(f"generate: a Decoder needs state=, of its method start; got {type(state).__name__}")
        if model.attention is None and type(model) is Decoder:
            return Network(model.embedding, model.rnn, model.head), state.hx
        return Written(model), state
    if isinstance(model, Seq2Seq):
        raise TypeError("generate: for a Seq2Seq give model.decoder, and state=model.start(source)")
    if isinstance(model, tuple):
        if len(model) != 3:
            raise ValueError(f"generate: expected (embedding, rnn, head), got a tuple of {len(model)}")
        if not isinstance(model[1], RECURRENT):
            raise TypeError(
                "generate: expected an RNN, LSTM, GRU, MGU, IndRNN, LiGRU or SLSTM between the two, got "
                f"{type(model[1]).__name__}"
            )
        return Network(*model), state
    if not callable(model):
        raise TypeError(
            "generate: expected (embedding, rnn, head), a Decoder or a function of tokens and state, got "
            f"{type(model).__name__}"
        )
    return Steps(model), state


def refusal(row: int, step: int, peak: float) -> str:
    what = "have NaN" if peak != peak else "have infinity" if peak > 0 else "are all negative infinity"
    return f"generate: the logits of row {row} {what} at step {step}, counted in its new tokens from 0"
