r"""The minimal gated unit (Zhou et al., *Minimal gated unit for recurrent neural networks*, 2016), in the form whose
gate acts on the product :math:`h W_{hn}^T + b_{hn}`, as :class:`torch.nn.GRU` has its reset gate, and not on h: one
product a step, where the paper's own :math:`(f_t \odot h_{t-1}) W_{hn}^T` takes two, one after the other.

.. math::
    \begin{aligned}
    f_t &= \sigma(x_t W_{if}^T + b_{if} + h_{t-1} W_{hf}^T + b_{hf}) \\
    n_t &= \tanh(x_t W_{in}^T + b_{in} + f_t \odot (h_{t-1} W_{hn}^T + b_{hn})) \\
    h_t &= (1 - f_t) \odot h_{t-1} + f_t \odot n_t
    \end{aligned}

The recurrent pre-activation of n is multiplied by f before it meets the input's, so their gradients differ
(``split``), and it is saved as the plane ``hn``. The mask ``candidate`` (Semeniuta et al. 2016) multiplies
:math:`n_t` in :math:`h_t`.

Backward: ``dn = dh * f * (1-n^2)``, ``df = (dh * (n - h0) + dn * hn) * f(1-f)``, ``dh0 = dh * (1-f)``; dgx is (df, dn)
and dgh is (df, dn * f).
"""

from __future__ import annotations

from rnnkern.cells.mgu.reference import jacobian, planes_jvp, step, step_backward, step_backward_jvp
from rnnkern.cells.spec import CellSpec

MGU = CellSpec(
    "mgu",
    gates=("f", "n"),
    states=("h",),
    planes=("f", "n", "hn"),
    step=step,
    step_backward=step_backward,
    jacobian=jacobian,
    planes_jvp=planes_jvp,
    step_backward_jvp=step_backward_jvp,
    split=("n",),
    norm=(1, 1),
    masks=("candidate",),
    mixes_h=True,
)
