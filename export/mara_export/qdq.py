"""Weight-only int8 and int4 in standard operators, as TensorRT reads them: DequantizeLinear in front of each MatMul.

Symmetric, rounded to nearest; `block_size` weights along the input dimension share a scale. The embedding's table stays
as it is: an engine would widen all of it to look one row up.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from mara_export.quantise import Quantisation
from mara_export.weights import Weights
from mara_runtime.errors import OptionError

_INTEGERS: dict[int, Any] = {4: ml_dtypes.int4, 8: np.int8}


def quantise_qdq(model: onnx.ModelProto, weights: Weights, how: Quantisation, parts: Any = iter) -> None:
    """Replace in place the matrices of a lowered LLM by integers and their scales.

    parts: wraps the sequence of matrices, for a progress bar. Raises OptionError when `keep` matches nothing, and when
    a matrix is no whole number of blocks.
    """
    graph = model.graph
    matrices = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    for pattern in how.keep:
        if not any(fnmatchcase(node.name, pattern) for node in matrices):
            raise OptionError(f"--keep is {pattern!r}, which matches no matrix; names are like {matrices[0].name}")
    kept = [node for node in matrices if any(fnmatchcase(node.name, pattern) for pattern in how.keep)]
    bits, block_size = how.bits, how.block_size
    made: dict[str, list[NodeProto]] = {}
    for node in parts([node for node in matrices if node not in kept]):
        name = node.input[1]
        values, scales = quantised(weights.read(name), node.name, bits, block_size)
        integers, scale, wide = f"{name}_int{bits}", f"{name}_scale", f"{name}_wide"
        weights.add(numpy_helper.from_array(values, integers))
        weights.add(numpy_helper.from_array(scales, scale))
        made[node.name] = [
            helper.make_node(
                "DequantizeLinear", [integers, scale], [wide], f"{node.name}/widen", axis=0, block_size=block_size
            )
        ]
        node.input[1] = wide
    nodes = [part for node in graph.node for part in (*made.get(node.name, ()), node)]
    del graph.node[:]
    graph.node.extend(nodes)


def quantised(
    matrix: NDArray[np.float32], name: str, bits: int, block_size: int
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Integers (K, N) and scales (K / block_size, N) of a matrix (K, N)."""
    rows, columns = matrix.shape
    if rows % block_size:
        raise OptionError(
            f"--block-size is {block_size}, and {name} has {rows} inputs, which is no multiple of it: take a smaller one, "
            "or leave the matrix as it is with --keep"
        )
    most = 2 ** (bits - 1) - 1
    blocks = matrix.reshape(rows // block_size, block_size, columns)
    scales = np.abs(blocks).max(axis=1) / np.float32(most)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    integers = np.clip(np.rint(blocks / scales[:, None]), -most, most)
    return integers.reshape(rows, columns).astype(np.int8).astype(_INTEGERS[bits]), scales
