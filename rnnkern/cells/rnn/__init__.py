r"""The simple recurrent network (Elman, *Finding Structure in Time*, 1990), in the form of :class:`torch.nn.RNN`.

.. math::
    h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})

or with :math:`\mathrm{ReLU}` in the place of :math:`\tanh`. With :math:`gx = x_t W_{ih}^T + b_{ih}` and
:math:`gh = h_{t-1} W_{hh}^T + b_{hh}`:

* forward: ``a = act(gx + gh)``, ``h = a``
* backward: ``da = dh * act'(a)``, ``dgx = dgh = da``; both derivatives are functions of ``a``.
"""

from __future__ import annotations

from rnnkern.cells.rnn.reference import relu_step, relu_step_backward, tanh_step, tanh_step_backward
from rnnkern.cells.spec import CellSpec

RNN_TANH = CellSpec("rnn_tanh", ("a",), ("h",), ("a",), tanh_step, tanh_step_backward)
RNN_RELU = CellSpec("rnn_relu", ("a",), ("h",), ("a",), relu_step, relu_step_backward)
