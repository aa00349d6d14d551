r"""The light gated recurrent unit (Ravanelli et al., *Light gated recurrent units for speech recognition*, 2018): a GRU
without its reset gate, with ReLU in the place of tanh. Batch normalisation, which keeps that ReLU bounded, is of the
input's side alone, so it is the module's work and not the cell's.

.. math::
    \begin{aligned}
    z_t &= \sigma(x_t W_{iz}^T + b_{iz} + h_{t-1} W_{hz}^T + b_{hz}) \\
    n_t &= \max(0, x_t W_{in}^T + b_{in} + h_{t-1} W_{hn}^T + b_{hn}) \\
    h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}
    \end{aligned}

The mask ``candidate`` (Semeniuta et al. 2016) multiplies :math:`n_t` in :math:`h_t`.

Backward: ``dz = dh * (h0 - n) * z(1-z)``, ``dn = dh * (1-z)`` where n is above 0, ``dh0 = dh * z``.
"""

from __future__ import annotations

from rnnkern.cells.ligru.reference import jacobian, planes_jvp, step, step_backward, step_backward_jvp
from rnnkern.cells.spec import CellSpec

LIGRU = CellSpec(
    "ligru",
    gates=("z", "n"),
    states=("h",),
    planes=("z", "n"),
    step=step,
    step_backward=step_backward,
    jacobian=jacobian,
    planes_jvp=planes_jvp,
    step_backward_jvp=step_backward_jvp,
    norm=(2,),
    masks=("candidate",),
    mixes_h=True,
)
