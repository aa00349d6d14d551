r"""The simple recurrent network (Elman, *Finding Structure in Time*, 1990), in the form of :class:`torch.nn.RNN`.

.. math::
    h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})

or with :math:`\mathrm{ReLU}` in the place of :math:`\tanh`. With :math:`gx = x_t W_{ih}^T + b_{ih}` and
:math:`gh = h_{t-1} W_{hh}^T + b_{hh}`:

* forward: ``a = act(gx + gh)``, ``h = a``
* backward: ``da = dh * act'(a)``, ``dgx = dgh = da``; both derivatives are functions of ``a``.
"""

from __future__ import annotations

from rnnkern.cells.rnn import reference as r
from rnnkern.cells.spec import CellSpec

RNN_TANH = CellSpec(
    "rnn_tanh",
    gates=("a",),
    states=("h",),
    planes=("a",),
    step=r.tanh_step,
    step_backward=r.tanh_step_backward,
    jacobian=r.tanh_jacobian,
    planes_jvp=r.tanh_planes_jvp,
    step_backward_jvp=r.tanh_step_backward_jvp,
)
RNN_RELU = CellSpec(
    "rnn_relu",
    gates=("a",),
    states=("h",),
    planes=("a",),
    step=r.relu_step,
    step_backward=r.relu_step_backward,
    jacobian=r.relu_jacobian,
    planes_jvp=r.relu_planes_jvp,
    step_backward_jvp=r.relu_step_backward_jvp,
)
