"""The conformance suite for devices against a graph that orders equal numbers the other way round, as a GPU may."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mara_runtime.engines.tensorrt import TrtEngine
from tests.conformance import SCHEDULES, Conformance, DeviceConformance
from tests.double.machine import Machine
from tests.unit.written_model import SHAPE, SLOTS, add_engines, write_bundle


def prefer_the_last_of_equals(folder: Path) -> None:
    """Change a bundle's graph: of equal logits the highest id comes first, of equal scores the last row is elected."""
    model = onnx.load(folder / "step.onnx")
    graph, last = model.graph, SHAPE.vocab_size - 1
    values = {"backwards": np.arange(last, -1, -1), "last": np.array(last)}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    for node in [node for node in graph.node if node.op_type == "ArgMax"]:
        node.attribute.append(helper.make_attribute("select_last_index", 1))
    (at,) = [i for i, node in enumerate(graph.node) if node.op_type == "TopK"]
    top = graph.node[at]
    before = helper.make_node("Gather", [top.input[0], "backwards"], ["turned"], axis=1)
    after = helper.make_node("Sub", ["last", "turned_ids"], [top.output[1]])
    top.input[0], top.output[1] = "turned", "turned_ids"
    graph.node.insert(at + 1, after)
    graph.node.insert(at, before)
    onnx.save(model, folder / "step.onnx")


@pytest.mark.slow
def test_the_device_suite_asks_for_no_order_of_equal_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch)
    made = add_engines(write_bundle(tmp_path, always_head=True), (SLOTS,), True)
    prefer_the_last_of_equals(tmp_path)
    engine = TrtEngine(made, "tensorrt")
    with pytest.raises(AssertionError):
        Conformance().test_any_sequence_of_passes_gives_what_the_table_gives(engine, 0)
    suite = DeviceConformance()
    for part in range(2):
        suite.test_any_sequence_of_passes_gives_what_the_table_gives(engine, part)
    for name in SCHEDULES:
        suite.test_answers_are_those_of_the_sequential_procedure(engine, name)
    engine.close()
