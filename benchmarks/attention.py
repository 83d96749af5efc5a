"""One attention layer on a CPU: GroupQueryAttention against MultiHeadAttention on groups of heads (the `ort` lowering).

    python benchmarks/attention.py [--heads 14] [--kv-heads 2] [--head-dim 64] [--threads 2]

Both write the new entries into the same kind of cache and attend over all of it, in turns; their results must agree.
Medians in µs by the rows of a pass, at several numbers of tokens in the cache.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

ROWS = (1, 2, 4, 8)
CONTEXTS = (256, 1024, 4096)
ROUNDS = 200
TOLERANCE = 1e-5
_MICROSOFT = "com.microsoft"
Floats = NDArray[np.float32]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, size in (("--heads", 14), ("--kv-heads", 2), ("--head-dim", 64), ("--threads", 2)):
        parser.add_argument(flag, type=int, default=size)
    args = parser.parse_args()
    sizes = args.heads, args.kv_heads, args.head_dim
    sessions = {name: _session(make(*sizes), args.threads) for name, make in (("gqa", _gqa), ("grouped", _grouped))}
    print(f"onnxruntime {ort.__version__}, {args.heads} heads on {args.kv_heads}, head size {args.head_dim}")
    print(f"{'tokens':>7} {'rows':>5} {'GroupQueryAttention':>20} {'on groups of heads':>19}  µs")
    for context in CONTEXTS:
        for rows in ROWS:
            passes = {name: _Pass(session, name, context, rows, sizes) for name, session in sessions.items()}
            for one in passes.values():
                one.run()
            apart = float(np.abs(passes["gqa"].result() - passes["grouped"].result()).max())
            if apart > TOLERANCE:
                raise SystemExit(f"the two differ by {apart:.1e} at {context} tokens and {rows} rows")
            times: dict[str, list[float]] = {name: [] for name in passes}
            for _ in range(ROUNDS):
                for name, one in passes.items():
                    started = time.perf_counter()
                    one.run()
                    times[name].append((time.perf_counter() - started) * 1e6)
            gqa, grouped = (float(np.median(times[name])) for name in ("gqa", "grouped"))
            print(f"{context:7} {rows:5} {gqa:20.0f} {grouped:19.0f}  × {grouped / gqa:.2f}")


def _gqa(heads: int, kv_heads: int, size: int) -> Any:
    inputs = ["q", "k", "v", "past_k", "past_v", "last", "slots", "", "", "", "mask"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["out", "present_k", "present_v"],
        domain=_MICROSOFT, num_heads=heads, kv_num_heads=kv_heads,
    )  # fmt: skip
    extra = [("last", TensorProto.INT32, [1]), ("slots", TensorProto.INT32, []), ("mask", TensorProto.FLOAT, _MASK)]
    return _model([node], extra, {}, heads * size, kv_heads, size)


def _grouped(heads: int, kv_heads: int, size: int) -> Any:
    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(op, inputs, [output], **attributes)

    nodes = [
        node("Reshape", ["k", "entry"], "k_entries"),
        node("ScatterND", ["past_k", "where", "k_entries"], "present_k"),
        node("Reshape", ["v", "entry"], "v_entries"),
        node("ScatterND", ["past_v", "where", "v_entries"], "present_v"),
        node("Reshape", ["q", "group"], "q_grouped"),
        node(
            "MultiHeadAttention", ["q_grouped", "present_k", "present_v", "", "", "mask"], "out_grouped",
            domain=_MICROSOFT, num_heads=kv_heads, scale=size**-0.5,
        ),
        node("Reshape", ["out_grouped", "whole"], "out"),
    ]  # fmt: skip
    shapes = {"entry": [-1, size], "group": [1, -1, kv_heads * size], "whole": [1, -1, heads * size]}
    extra = [("where", TensorProto.INT64, ["E", 3]), ("mask", TensorProto.FLOAT, _MASK)]
    return _model(nodes, extra, shapes, heads * size, kv_heads, size)


_MASK = [1, 1, "M", "C"]


def _model(
    nodes: list[NodeProto], extra: list[Any], shapes: dict[str, list[int]], width: int, kv_heads: int, size: int
) -> Any:
    info, cache = helper.make_tensor_value_info, [1, kv_heads, "C", size]
    entries = [(part, TensorProto.FLOAT, [1, "S", kv_heads * size]) for part in "kv"]
    pasts = [(f"past_{part}", TensorProto.FLOAT, cache) for part in "kv"]
    graph = helper.make_graph(
        nodes,
        "attention",
        [info(*value) for value in (("q", TensorProto.FLOAT, [1, "S", width]), *entries, *pasts, *extra)],
        [
            info("out", TensorProto.FLOAT, [1, "S", width]),
            *(info(f"present_{p}", TensorProto.FLOAT, cache) for p in "kv"),
        ],
        [numpy_helper.from_array(np.array(values, np.int64), name) for name, values in shapes.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _session(model: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Pass:
    """A causal pass of `rows` rows after `context` tokens, bound once; the cache is as large as it must be."""

    def __init__(self, session: Any, name: str, context: int, rows: int, sizes: tuple[int, int, int]) -> None:
        heads, kv_heads, size = sizes
        groups, slots = heads // kv_heads, context + rows
        rng = np.random.default_rng(0)  # the same numbers for both

        def floats(*shape: int) -> Floats:
            return rng.standard_normal(shape).astype(np.float32)

        q, k, v = (
            floats(rows, kv_heads, groups, size),
            floats(1, rows, kv_heads * size),
            floats(1, rows, kv_heads * size),
        )
        pasts = {part: floats(1, kv_heads, slots, size) for part in "kv"}
        seen = np.arange(slots) <= context + np.arange(rows)[:, None]
        mask = np.where(seen, 0.0, -3e4).astype(np.float32)
        self._groups_first = name == "grouped"
        if self._groups_first:
            q, mask = q.swapaxes(1, 2), mask.repeat(groups, axis=0)
        self._shape = q.shape
        places = [(0, head, context + row) for row in range(rows) for head in range(kv_heads)]
        values = {
            "q": q.reshape(1, rows, -1), "k": k, "v": v, "mask": mask[None, None],
            "last": np.array([context + rows - 1], np.int32), "slots": np.array(slots, np.int32),
            "where": np.array(places),
        }  # fmt: skip
        self._session, self._binding = session, session.io_binding()
        self._out = np.zeros((1, rows, heads * size), np.float32)
        self._kept = [self._bind_output("out", self._out)]
        wanted = {value.name for value in session.get_inputs()}
        for key, value in values.items():
            if key in wanted:
                self._kept.append(self._bind_input(key, np.ascontiguousarray(value)))
        for part, past in pasts.items():
            self._kept += [self._bind_input(f"past_{part}", past), self._bind_output(f"present_{part}", past)]

    def _bind_input(self, name: str, array: Any) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, value)
        return value, array

    def _bind_output(self, name: str, array: Any) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_output(name, value)
        return value, array

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def result(self) -> Floats:
        """(rows, kv_heads, groups, head size)"""
        out: Floats = self._out.reshape(self._shape)
        return out.swapaxes(1, 2) if self._groups_first else out


if __name__ == "__main__":
    main()
