"""The cells: one folder of equations each. A new pointwise cell is a folder and a line here."""

from __future__ import annotations

from rnnkern.cells.gru import GRU
from rnnkern.cells.indrnn import INDRNN_RELU, INDRNN_TANH
from rnnkern.cells.ligru import LIGRU
from rnnkern.cells.lstm import LSTM
from rnnkern.cells.mgu import MGU
from rnnkern.cells.rnn import RNN_RELU, RNN_TANH
from rnnkern.cells.slstm import SLSTM
from rnnkern.cells.spec import Aux, CellSpec

_ALL = (RNN_TANH, RNN_RELU, LSTM, GRU, MGU, INDRNN_TANH, INDRNN_RELU, LIGRU, SLSTM)
CELLS: dict[str, CellSpec] = {cell.name: cell for cell in _ALL}

__all__ = ["CELLS", "Aux", "CellSpec"]
