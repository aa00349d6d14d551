r"""The gated recurrent unit (Cho et al. 2014), in the form of :class:`torch.nn.GRU`, where the reset gate acts on the
product :math:`h W_{hn}^T + b_{hn}` and not on h.

.. math::
    \begin{aligned}
    r_t &= \sigma(x_t W_{ir}^T + b_{ir} + h_{t-1} W_{hr}^T + b_{hr}) \\
    z_t &= \sigma(x_t W_{iz}^T + b_{iz} + h_{t-1} W_{hz}^T + b_{hz}) \\
    n_t &= \tanh(x_t W_{in}^T + b_{in} + r_t \odot (h_{t-1} W_{hn}^T + b_{hn})) \\
    h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}
    \end{aligned}

The recurrent pre-activation of n is multiplied by r before it meets the input's, so their gradients differ
(``split``), and it is saved as the plane ``hn``. The mask ``candidate`` (Semeniuta et al. 2016) multiplies
:math:`n_t` in :math:`h_t`.

Backward: ``dz = dh * (h0 - n) * z(1-z)``, ``dn = dh * (1-z) * (1-n^2)``, ``dr = dn * hn * r(1-r)``, ``dh0 = dh * z``;
dgx is (dr, dz, dn) and dgh is (dr, dz, dn * r).
"""

from __future__ import annotations

from rnnkern.cells.gru.reference import jacobian, planes_jvp, step, step_backward, step_backward_jvp
from rnnkern.cells.spec import CellSpec

GRU = CellSpec(
    "gru",
    gates=("r", "z", "n"),
    states=("h",),
    planes=("r", "z", "n", "hn"),
    step=step,
    step_backward=step_backward,
    jacobian=jacobian,
    planes_jvp=planes_jvp,
    step_backward_jvp=step_backward_jvp,
    split=("n",),
    norm=(2, 1),
    masks=("candidate",),
    mixes_h=True,
)
