"""Looking into a recurrent network: how gradients flow through time, what its units do, how it unrolls."""

from rnnkern.diagnostics._flow import GradientFlow, LayerFlow, gradient_flow
from rnnkern.diagnostics._states import StateMap, state_map
from rnnkern.diagnostics._unrolled import unrolled

__all__ = ["GradientFlow", "LayerFlow", "StateMap", "gradient_flow", "state_map", "unrolled"]
