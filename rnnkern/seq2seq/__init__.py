"""Sequence to sequence: an encoder that reads, a decoder that writes, and attention between them.

Time-major as torch.nn unless `batch_first`; letters in shapes: L source steps, T target steps, N batch, V tokens.
"""

from rnnkern.seq2seq._attention import Attention
from rnnkern.seq2seq._decoder import Decoder, DecoderState
from rnnkern.seq2seq._encoder import Encoder
from rnnkern.seq2seq._model import Bridge, Seq2Seq

__all__ = ["Attention", "Bridge", "Decoder", "DecoderState", "Encoder", "Seq2Seq"]
