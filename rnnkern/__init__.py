"""PyTorch's recurrent networks, drop-in and fast. Importing this loads no Triton, Numba or native code."""

from rnnkern import diagnostics, functional, init, seq2seq
from rnnkern._generate import Generated, generate
from rnnkern._override import override
from rnnkern._tbptt import tbptt
from rnnkern.beyond import MGU, SLSTM, IndRNN, LiGRU
from rnnkern.beyond_cells import IndRNNCell, LiGRUCell, MGUCell, SLSTMCell
from rnnkern.convert import accelerate, restore
from rnnkern.dispatch import backends, use_backend
from rnnkern.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnkern.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "GRUCell",
    "Generated",
    "IndRNN",
    "LiGRU",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "accelerate",
    "backends",
    "diagnostics",
    "functional",
    "generate",
    "init",
    "override",
    "restore",
    "seq2seq",
    "tbptt",
    "use_backend",
    "IndRNNCell",
    "LiGRUCell",
    "MGUCell",
    "SLSTMCell",
]
