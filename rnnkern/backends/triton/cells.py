"""The cells that have a step in Triton, by the names of rnnkern.cells."""

from __future__ import annotations

from typing import Any, NamedTuple

from rnnkern.cells.gru import triton_step as gru
from rnnkern.cells.ligru import triton_step as ligru
from rnnkern.cells.lstm import triton_step as lstm
from rnnkern.cells.mgu import triton_step as mgu
from rnnkern.cells.rnn import triton_step as rnn
from rnnkern.cells.slstm import triton_step as slstm


class TritonCell(NamedTuple):
    step: Any  # (gx, gh, entering states, aux) -> (new states, planes), tuples of tiles in the accumulation dtype
    step_backward: Any  # (dstates, planes, entering states, aux) -> (dgx, dgh, dentering, dsmall)


STEPS = {
    "rnn_tanh": TritonCell(rnn.tanh_step, rnn.tanh_step_backward),
    "rnn_relu": TritonCell(rnn.relu_step, rnn.relu_step_backward),
    "lstm": TritonCell(lstm.step, lstm.step_backward),
    "gru": TritonCell(gru.step, gru.step_backward),
    "mgu": TritonCell(mgu.step, mgu.step_backward),
    "ligru": TritonCell(ligru.step, ligru.step_backward),
    "slstm": TritonCell(slstm.step, slstm.step_backward),
    "indrnn_tanh": TritonCell(rnn.tanh_step, rnn.tanh_step_backward),
    "indrnn_relu": TritonCell(rnn.relu_step, rnn.relu_step_backward),
}
