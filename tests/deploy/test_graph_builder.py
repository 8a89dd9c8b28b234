from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from deploy.graph_builder import GraphBuilder, graph_value, name_output


def test_equal_constants_share_one_initializer_and_unequal_ones_do_not() -> None:
    graph = GraphBuilder("g")
    one = graph.constant(np.float32(1.0))
    assert graph.constant(np.float32(1.0)) is one
    others = [np.int64(1), np.float64(1.0), np.float32(2.0), np.array([1.0], np.float32)]
    values = [one, *(graph.constant(other) for other in others)]
    assert len({id(value) for value in values}) == len(values)
    assert one.const_value is not None
    assert one.const_value.shape.numpy() == ()


def test_an_initializer_name_is_taken_once() -> None:
    graph = GraphBuilder("g")
    graph.weight("w", ir.tensor(np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="'w' is added twice"):
        graph.weight("w", ir.tensor(np.ones(2, np.float32)))


def test_lazy_weights_are_read_while_the_model_is_saved_and_the_graph_runs(tmp_path: Path) -> None:
    graph = GraphBuilder("g")
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    reads = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(weight)

    x = graph_value("x", ir.DataType.FLOAT, ("rows", 64))
    lazy = graph.lazy_weight("w", ir.DataType.FLOAT, weight.shape, read)
    y = graph.value("MatMul", [x, lazy], "MatMul")
    y = graph.value("Add", [y, graph.constant(np.float32(0.5))], "Add")
    model = graph.build([x], [name_output(y, "y", ir.DataType.FLOAT, ("rows", 64))])
    assert not reads
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=1024)
    assert reads
    assert (
        (tmp_path / "m.data").stat().st_size >= weight.nbytes > (tmp_path / "m.onnx").stat().st_size
    )
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    given = np.eye(3, 64, dtype=np.float32)
    np.testing.assert_array_equal(session.run(["y"], {"x": given})[0], given @ weight + 0.5)


def test_a_choice_runs_one_operator_with_the_inputs_of_its_condition(tmp_path: Path) -> None:
    graph = GraphBuilder("g")
    x = graph_value("x", ir.DataType.FLOAT, ("rows", 2))
    many = graph_value("many", ir.DataType.BOOL, ())
    small, great = (graph.constant(np.float32(number)) for number in (0, 3))
    y, mask = graph.choice(
        many,
        "Dropout",
        ([x, small], [graph.value("Mul", [x, great], "Mul")]),
        "choice",
        forms=("kept", "scaled"),
        outputs={"": ir.DataType.FLOAT, "_mask": ir.DataType.BOOL},
    )
    outputs = [
        name_output(y, "y", ir.DataType.FLOAT, ("rows", 2)),
        name_output(mask, "mask", ir.DataType.BOOL, ("rows", 2)),
    ]
    ir.save(graph.build([x, many], outputs), tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    given = np.ones((4, 2), np.float32)
    for condition, factor in ((True, 1), (False, 3)):
        found, kept = session.run(["y", "mask"], {"x": given, "many": np.array(condition)})
        np.testing.assert_array_equal(found, factor * given)
        assert kept.all()


def test_an_optional_input_takes_its_default_where_nothing_is_fed(tmp_path: Path) -> None:
    graph = GraphBuilder("g")
    x = graph_value("x", ir.DataType.FLOAT, ("rows", 2))
    a = graph.optional_input("a", (2, "rank"), np.zeros((2, 0), np.float32))
    b = graph.optional_input("b", ("rank", 3), np.zeros((0, 3), np.float32))
    y = graph.value("MatMul", [graph.value("MatMul", [x, a], "inner"), b], "outer")
    ir.save(
        graph.build([x], [name_output(y, "y", ir.DataType.FLOAT, ("rows", 3))]),
        tmp_path / "m.onnx",
    )
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_overridable_initializers()] == ["a", "b"]
    given = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(session.run(["y"], {"x": given})[0], np.zeros((4, 3)))
    for rank in (1, 5):
        feeds = {"x": given, "a": np.ones((2, rank), np.float32)}
        feeds["b"] = np.ones((rank, 3), np.float32)
        np.testing.assert_array_equal(session.run(["y"], feeds)[0], np.full((4, 3), 2 * rank))
    with pytest.raises(ValueError, match="'a' is added twice"):
        graph.optional_input("a", (2,), np.zeros(2, np.float32))


def test_absent_inputs_and_outputs_have_empty_names() -> None:
    graph = GraphBuilder("g")
    x = graph_value("x", ir.DataType.FLOAT, (2,))
    first, absent, last = graph.node("Thing", [x, None], "t", outputs=("", None, "_stream"))
    assert (first.name, absent.name, last.name) == ("t/output", "", "t/output_stream")
    node = first.producer()
    assert node is not None
    assert list(node.inputs) == [x, None]
