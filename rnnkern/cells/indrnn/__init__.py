r"""The independently recurrent network (Li et al., *Independently recurrent neural network (IndRNN): building a longer
and deeper RNN*, 2018): a simple recurrent network each of whose units sees of h itself alone.

.. math::
    h_t = \mathrm{act}(x_t W_{ih}^T + b_{ih} + u \odot h_{t-1} + b_{hh})

with :math:`\mathrm{act}` ReLU or tanh. u [H] stands where the others have :math:`W_{hh}`, so the recurrence is
"diagonal": drivers make :math:`gh = u \odot h_{t-1} + b_{hh}` without a product. From there on the equations, and
their derivatives, are those of rnn_relu and rnn_tanh.
"""

from __future__ import annotations

from dataclasses import replace

from rnnkern.cells.rnn import RNN_RELU, RNN_TANH

INDRNN_RELU = replace(RNN_RELU, name="indrnn_relu", recurrence="diagonal")
INDRNN_TANH = replace(RNN_TANH, name="indrnn_tanh", recurrence="diagonal")
