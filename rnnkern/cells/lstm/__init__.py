r"""Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), in the form of
:class:`torch.nn.LSTM`.

.. math::
    \begin{aligned}
    i_t &= \sigma(x_t W_{ii}^T + b_{ii} + h_{t-1} W_{hi}^T + b_{hi}) \\
    f_t &= \sigma(x_t W_{if}^T + b_{if} + h_{t-1} W_{hf}^T + b_{hf}) \\
    g_t &= \tanh(x_t W_{ig}^T + b_{ig} + h_{t-1} W_{hg}^T + b_{hg}) \\
    o_t &= \sigma(x_t W_{io}^T + b_{io} + h_{t-1} W_{ho}^T + b_{ho}) \\
    c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
    h_t &= o_t \odot \tanh(c_t)
    \end{aligned}

A projection (Sak et al. 2014), :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))`, is the driver's work, not the cell's.

Options beyond torch's, each off where its parameter, mask or bound is absent:

* peepholes (Gers and Schmidhuber 2000): :math:`p_i \odot c_{t-1}` and :math:`p_f \odot c_{t-1}` are added to the
  pre-activations of i and f, :math:`p_o \odot c_t` to that of o;
* ``cell_clip`` (Sak et al. 2014): :math:`c_t` is kept within [-cell_clip, cell_clip];
* the mask ``candidate`` (Semeniuta et al. 2016): :math:`g_t` is multiplied by it in :math:`c_t`;
* ``ln_c``, ``ln_c_bias`` (Ba et al. 2016): :math:`h_t = o_t \odot \tanh(LN(c_t) \odot ln_c + ln_{c\,bias})`.

Backward, with ``u = tanh(c)``: ``do = dh * u * o(1-o)``, ``dc += dh * o * (1-u^2)``, ``di = dc * g * i(1-i)``,
``df = dc * c0 * f(1-f)``, ``dg = dc * i * (1-g^2)``, ``dc0 = dc * f``. c is rebuilt from the planes and the entering
c0, so it is right under zoneout and clipping, where the c that was stored is another one.
"""

from __future__ import annotations

from rnnkern.cells.lstm.reference import jacobian, planes_jvp, step, step_backward, step_backward_jvp
from rnnkern.cells.spec import CellSpec

LSTM = CellSpec(
    "lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    planes=("i", "f", "g", "o"),
    step=step,
    step_backward=step_backward,
    jacobian=jacobian,
    planes_jvp=planes_jvp,
    step_backward_jvp=step_backward_jvp,
    small=("peephole_i", "peephole_f", "peephole_o", "ln_c", "ln_c_bias"),
    row=("ln_c", "ln_c_bias"),
    norm=(4,),
    masks=("candidate",),
)
