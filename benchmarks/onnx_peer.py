"""ONNX Runtime's recurrent layers, where it is installed: a rival of forward passes on a CPU."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Where ONNX puts each of torch's gates: LSTM i, o, f, c of i, f, g, o; GRU z, r, n of r, z, n.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def available() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))


def recurrence(kind: str, module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A session that runs torch's one-layer module on x (B, T, I), as a function that gives (B, T, H)."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    order, width = ORDER[kind], x.shape[2]

    def reordered(name: str) -> Any:
        parts = getattr(module, name).detach().cpu().float().numpy()
        return np.split(parts, len(order))

    def joined(name: str) -> Any:
        parts = reordered(name)
        return np.concatenate([parts[gate] for gate in order])[None]

    bias = np.concatenate([joined("bias_ih_l0"), joined("bias_hh_l0")], 1)
    weights = {"W": joined("weight_ih_l0"), "R": joined("weight_hh_l0"), "bias": bias}
    options: dict[str, Any] = {} if kind == "LSTM" else {"linear_before_reset": 1}
    hidden = weights["R"].shape[2]
    nodes = [
        helper.make_node("Transpose", ["x"], ["time_first"], perm=[1, 0, 2]),
        helper.make_node(kind, ["time_first", "W", "R", "bias"], ["y"], hidden_size=hidden, **options),
        helper.make_node("Squeeze", ["y", "direction"], ["y_squeezed"]),
        helper.make_node("Transpose", ["y_squeezed"], ["output"], perm=[1, 0, 2]),
    ]
    constants = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "direction"))
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, width])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None, None, hidden])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x.detach().numpy()})[0])
