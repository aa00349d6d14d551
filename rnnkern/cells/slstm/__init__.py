r"""sLSTM, the scalar-memory cell of xLSTM (Beck et al., *xLSTM: extended long short-term memory*, 2024, section 2.2; of
the two forget gates that it names, :math:`\sigma`).

.. math::
    \begin{aligned}
    \tilde{\imath}_t &= x_t W_{ii}^T + b_{ii} + h_{t-1} W_{hi}^T + b_{hi} \\
    \tilde{f}_t &= x_t W_{if}^T + b_{if} + h_{t-1} W_{hf}^T + b_{hf} \\
    z_t &= \tanh(x_t W_{iz}^T + b_{iz} + h_{t-1} W_{hz}^T + b_{hz}) \\
    o_t &= \sigma(x_t W_{io}^T + b_{io} + h_{t-1} W_{ho}^T + b_{ho}) \\
    m_t &= \max(\log \sigma(\tilde{f}_t) + m_{t-1}, \tilde{\imath}_t) \\
    i'_t &= \exp(\tilde{\imath}_t - m_t), \quad f'_t = \exp(\log \sigma(\tilde{f}_t) + m_{t-1} - m_t) \\
    c_t &= f'_t \odot c_{t-1} + i'_t \odot z_t \\
    n_t &= f'_t \odot n_{t-1} + i'_t \\
    h_t &= o_t \odot c_t / n_t
    \end{aligned}

Heads are groups of the scan: W_h is one block for each.

c and n are sums of the past by weights that lie exp(m) above what is stored. So where n is 0 there is no past: such a
unit begins, with :math:`m_t = \tilde{\imath}_t` and :math:`f'_t = 0`, whatever c and m are. By the formulas alone an
input gate that is far below m = 0 would give 0 / 0. One of i' and f' is always 1, so n is 1 or more from the first step
on, and nothing has to keep it from 0.

With :math:`d = \log \sigma(\tilde{f}) + m_{t-1} - \tilde{\imath}`, -inf where a unit begins, i' is
:math:`\exp(-\max(d, 0))` and f' is :math:`\exp(\min(d, 0))`: d is the plane, beside z, o and
:math:`r = 1 - \sigma(\tilde{f})`, the derivative of :math:`\log \sigma`. The mask ``candidate`` (Semeniuta et al. 2016)
multiplies :math:`z_t` in :math:`c_t`.

Backward, with ``q = c / n``: ``do = dh * q * o(1-o)``, ``dc += dh * o / n``, ``dn -= dh * o * q / n``,
``dz = dc * i' * (1-z^2)``, ``di' = dc * z + dn``, ``df' = dc * c0 + dn * n0``, ``dc0 = dc * f'``, ``dn0 = dn * f'``.
The gradient at log f + m0 is ``db = dm - di' * i'`` where that is the larger (d > 0), else ``df' * f'``, in a tie too;
then ``df = db * r``, ``dm0 = db``, ``di = dm - db``. c and n are rebuilt from the planes and the states that entered.
"""

from __future__ import annotations

from rnnkern.cells.slstm.reference import jacobian, planes_jvp, step, step_backward, step_backward_jvp
from rnnkern.cells.spec import CellSpec

SLSTM = CellSpec(
    "slstm",
    gates=("i", "f", "z", "o"),
    states=("h", "c", "n", "m"),
    planes=("z", "o", "r", "d"),
    step=step,
    step_backward=step_backward,
    jacobian=jacobian,
    planes_jvp=planes_jvp,
    step_backward_jvp=step_backward_jvp,
    norm=(4,),
    masks=("candidate",),
    scaled=True,
)
