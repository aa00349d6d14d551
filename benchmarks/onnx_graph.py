"""A case as an ONNX graph, for the peers that run ONNX models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem, Unavailable

# torch's gate blocks in ONNX's order: LSTM i,f,g,o -> i,o,f,c; GRU r,z,n -> z,r,h
ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def feed(problem: Problem) -> dict[str, Any]:
    """The model's inputs as arrays. Packed cases get padded input and lengths, which is ONNX's form of them."""
    shape = problem.case.shape
    x = problem.x.unsqueeze(0) if shape.layout == "cell" else problem.x
    given = {"x": x.numpy()}
    if shape.layout == "packed":
        given["lengths"] = shape.lengths().int().numpy()
    given |= {f"{name}0": h.unsqueeze(0).numpy() for name, h in zip("hc", problem.hx, strict=False)}
    return given


def from_onnx(problem: Problem, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs in torch's shapes and under the names that `named` gives."""
    if problem.case.shape.layout == "cell":
        return {name: found[name].squeeze(0) for name in found}
    layers = problem.case.shape.layers
    states = {name: torch.cat([found[f"{name}{k}"] for k in range(layers)]) for name in "hc" if f"{name}0" in found}
    return {"y": found["y"], **states}


def onnx_model(problem: Problem) -> bytes:
    """The case as an ONNX graph: one recurrent node a layer, its directions merged behind it as torch does."""
    try:
        import onnx
    except ImportError as error:
        raise Unavailable("onnx is not installed") from error
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    case, shape = problem.case, problem.case.shape
    if case.cell not in ONNX_GATES:
        raise Unavailable(f"ONNX has no operator for {case.cell}")
    G, D, H = ONNX_GATES[case.cell], shape.directions, shape.H
    cell_layout, packed = shape.layout == "cell", shape.layout == "packed"
    states = ("h", "c") if case.cell == "lstm" else ("h",)

    def gates(name: str) -> Tensor:
        blocks = problem.weights[name].chunk(len(G))
        return torch.cat([blocks[gate] for gate in G])

    nodes, constants, outputs, source = [], [], [], "x"
    for layer in range(shape.layers):
        ends = [""] if cell_layout else [f"_l{layer}{suffix}" for suffix in ("", "_reverse")[:D]]
        biases = [torch.cat((gates(f"bias_ih{end}"), gates(f"bias_hh{end}"))) for end in ends]
        constants += [
            array(torch.stack([gates(f"weight_ih{end}") for end in ends]).numpy(), f"W{layer}"),
            array(torch.stack([gates(f"weight_hh{end}") for end in ends]).numpy(), f"R{layer}"),
            array(torch.stack(biases).numpy(), f"B{layer}"),
        ]
        inputs = [source, f"W{layer}", f"R{layer}", f"B{layer}", "lengths" if packed else ""]
        inputs += [f"{name}0" for name in states] if cell_layout else []
        final = list(states) if cell_layout else [f"{name}{layer}" for name in states]
        options: dict[str, Any] = {"linear_before_reset": 1} if case.cell == "gru" else {}
        direction = "bidirectional" if D == 2 else "forward"
        steps = "" if cell_layout else f"steps{layer}"
        nodes.append(
            helper.make_node(case.cell.upper(), inputs, [steps, *final], hidden_size=H, direction=direction, **options)
        )
        outputs += final
        if not cell_layout:  # [T, D, B, H] -> [T, B, D*H]
            source = "y" if layer == shape.layers - 1 else f"y{layer}"
            if D == 1:
                constants.append(array(torch.tensor([1]).numpy(), f"axis{layer}"))
                nodes.append(helper.make_node("Squeeze", [steps, f"axis{layer}"], [source]))
            else:
                constants.append(array(torch.tensor([shape.steps, shape.B, D * H]).numpy(), f"sizes{layer}"))
                nodes.append(helper.make_node("Transpose", [steps], [f"turned{layer}"], perm=[0, 2, 1, 3]))
                nodes.append(helper.make_node("Reshape", [f"turned{layer}", f"sizes{layer}"], [source]))

    declared = [
        helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feed(problem).items()
    ]
    states_shape = [D, shape.B, H]
    given = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, states_shape) for name in outputs]
    if not cell_layout:
        sizes = [shape.steps, shape.B, D * H]
        given.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, sizes))
    graph = helper.make_graph(nodes, str(case), declared, given, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()
