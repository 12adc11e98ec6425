"""A cascade inside the ONNX graph: members are asked one after another, and of a batch only the rows that are unsure.

onnxruntime computes the whole graph whatever outputs are asked for (measured, docs/LOG.md), so the later members stand in
`If` nodes. A second input, `stop`, holds the confidence at which an answer is given after each stage. It has a default
that no confidence reaches: who feeds images alone gets the full answer, from the same arithmetic as without a cascade.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from threefold.cascade import NEVER, Cascade
from threefold.errors import ExportError
from threefold.predictions__checks import FLOOR

STOP: Final = "stop"
"""The input: float (stages - 1,), the confidence at which the answer is given after each stage; its default is NEVER."""
STAGES_USED: Final = "stages_used"
"""The output: int64 (b,), how many stages of the cascade ran for each image."""


def add_cascade(model: Any, cascade: Cascade, networks: Sequence[Sequence[str]]) -> Any:
    """The model with a cascade in it, a new one.

    Args:
        model: images -> probs, member_probs, with a value `m{i}_probs` (b, k) for each member.
        cascade: fitted, of these members.
        networks: for each member the names of the values (b, k) that its networks give.

    Raises:
        ExportError: the cascade is of other members, or a network's nodes cannot be told from the rest.
    """
    if sorted(i for stage in cascade.stages for i in stage) != list(range(len(networks))):
        raise ExportError(
            "the cascade is of other members", expected=len(networks), got=cascade.stages
        )
    graph = _Split(
        model, [[name for i in stage for name in networks[i]] for stage in cascade.stages]
    )
    for s in range(1, len(cascade.stages)):
        _add_exit(graph, cascade, s - 1)
        _add_branch(graph, s)
    _add_answer(graph, len(cascade.stages))
    return graph.finish(len(cascade.stages))


class _Split:
    """A graph's nodes, those that only one later stage needs apart from the rest."""

    def __init__(self, model: Any, stages: list[list[str]]) -> None:
        self.model, self.stages = model, stages
        nodes = [_copied(node) for node in model.graph.node]
        made_by = {name: i for i, node in enumerate(nodes) for name in node.output}
        needs = [_ancestors(nodes, made_by, names) for names in stages]
        alone = [
            need.difference(*(other for other in needs if other is not need)) for need in needs
        ]
        moved = set().union(*alone[1:])
        self.parts = [[nodes[i] for i in sorted(mine)] for mine in alone]
        self.main = [node for i, node in enumerate(nodes) if i not in moved]
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.inner: set[str] = set()
        self.new: list[Any] = []

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node of the outer graph; returns its output."""
        self.new.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any, kind: Any) -> str:
        """A named constant of the outer graph."""
        self.weights[name] = onnx.numpy_helper.from_array(np.asarray(value, kind), name)
        return name

    def finish(self, stages: int) -> Any:
        """The new model, its nodes in an order in which each follows what it needs."""
        old = self.model
        inputs = [
            *old.graph.input,
            helper.make_tensor_value_info(STOP, TensorProto.FLOAT, [stages - 1]),
        ]
        outputs = [
            *old.graph.output,
            helper.make_tensor_value_info(STAGES_USED, TensorProto.INT64, ["batch"]),
        ]
        weights = [tensor for name, tensor in self.weights.items() if name not in self.inner]
        graph = helper.make_graph(
            _sorted([*self.main, *self.new]), old.graph.name, inputs, outputs, initializer=weights
        )
        made = helper.make_model(graph, producer_name=old.producer_name, ir_version=old.ir_version)
        del made.opset_import[:]
        made.opset_import.extend(old.opset_import)
        made.metadata_props.extend(old.metadata_props)
        return made


def _ancestors(nodes: Sequence[Any], made_by: dict[str, int], names: Sequence[str]) -> set[int]:
    """Numbers of the nodes that values need."""
    found: set[int] = set()
    todo = [made_by[name] for name in names]
    while todo:
        number = todo.pop()
        if number not in found:
            found.add(number)
            todo += [made_by[name] for name in nodes[number].input if name in made_by]
    return found


def _sorted(nodes: Sequence[Any]) -> list[Any]:
    """Nodes so that each follows what it needs, otherwise as they come."""
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output}
    needs = [[made_by[name] for name in _needs(node) if name in made_by] for node in nodes]
    order: dict[int, None] = {}
    todo = [(i, False) for i in reversed(range(len(nodes)))]
    while todo:
        number, ready = todo.pop()
        if ready:
            order[number] = None
        elif number not in order:
            todo.append((number, True))
            todo += [(need, False) for need in needs[number] if need not in order]
    return [nodes[i] for i in order]


def _copied(node: Any) -> Any:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _needs(node: Any) -> set[str]:
    """Names that a node takes, those of its branches from outside among them."""
    found = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inside = {name for inner in attribute.g.node for name in inner.output}
            inside |= {tensor.name for tensor in attribute.g.initializer}
            found |= {name for inner in attribute.g.node for name in inner.input} - inside
    return found


def _add_exit(graph: _Split, cascade: Cascade, s: int) -> None:
    """After stage s: the calibrated mean of the members so far, how sure it is, who stops here and who goes on."""
    asked = [i for stage in cascade.stages[: s + 1] for i in stage]
    mean = graph.add("Mean", [f"m{i}_probs" for i in asked], f"exit{s}_mean")
    logs = graph.add(
        "Log",
        [graph.add("Max", [mean, graph.constant("floor", FLOOR, np.float32)], f"exit{s}_max")],
        f"exit{s}_log",
    )
    heat = graph.constant(f"exit{s}_heat", 1 / cascade.temperatures_[s], np.float32)
    probs = graph.add(
        "Softmax", [graph.add("Mul", [logs, heat], f"exit{s}_mul")], f"exit{s}_probs", axis=-1
    )
    two = [f"exit{s}_first", f"exit{s}_ranks"]
    graph.new.append(
        helper.make_node("TopK", [probs, graph.constant("two", [2], np.int64)], two, name=two[0])
    )
    first = graph.add(
        "Gather", [two[0], graph.constant("place0", 0, np.int64)], f"exit{s}_top", axis=1
    )
    second = graph.add(
        "Gather", [two[0], graph.constant("place1", 1, np.int64)], f"exit{s}_next", axis=1
    )
    margin = graph.add("Sub", [first, second], f"exit{s}_margin")
    wanted = graph.add(
        "Gather", [STOP, graph.constant(f"place{s}", s, np.int64)], f"exit{s}_stop", axis=0
    )
    sure = graph.add("GreaterOrEqual", [margin, wanted], f"exit{s}_sure")
    unsure = graph.add("Not", [sure], f"exit{s}_unsure")
    graph.add("And", [f"active{s}", unsure], f"active{s + 1}") if s else graph.add(
        "Identity", [unsure], "active1"
    )
    graph.add("Unsqueeze", [sure, graph.constant("axis_last", [1], np.int64)], f"exit{s}_rows")


def _add_branch(graph: _Split, s: int) -> None:
    """Stage s on the rows that are still unsure; zeros for the others."""
    nodes, weights = graph.parts[s], graph.weights
    made = {name for node in nodes for name in node.output}
    taken = [name for node in nodes for name in node.input if name and name not in made]
    elsewhere = {name for node in graph.main for name in node.input}
    elsewhere |= {
        name for part in graph.parts if part is not nodes for node in part for name in node.input
    }
    own = dict.fromkeys(name for name in taken if name in weights and name not in elsewhere)
    rows = dict.fromkeys(name for name in taken if name not in weights)
    if not set(graph.stages[s]) <= made:
        raise ExportError(
            "a stage of the cascade shares all of its nodes with others", got=graph.stages[s]
        )
    index = f"stage{s}_index"
    inner = [
        helper.make_node("NonZero", [f"active{s}"], [f"stage{s}_found"]),
        helper.make_node("Squeeze", [f"stage{s}_found", "axis_first"], [index]),
        helper.make_node("Unsqueeze", [index, "axis_last"], [f"stage{s}_places"]),
    ]
    graph.constant("axis_first", [0], np.int64)
    fed = {name: f"stage{s}_{name}" for name in rows}
    inner += [helper.make_node("Gather", [name, index], [fed[name]], axis=0) for name in rows]
    for node in nodes:
        node.input[:] = [fed.get(name, name) for name in node.input]
    inner += nodes
    outer = graph.stages[s]
    inner += [
        helper.make_node("ScatterND", ["no_probs", f"stage{s}_places", name], [f"stage{s}_{name}"])
        for name in outer
    ]
    graph.inner.update(own)

    def ends(prefix: str) -> list[Any]:
        return [
            helper.make_tensor_value_info(f"{prefix}_{name}", TensorProto.FLOAT, None)
            for name in outer
        ]

    then = helper.make_graph(
        inner, f"stage{s}", [], ends(f"stage{s}"), initializer=[weights[name] for name in own]
    )
    nothing = [helper.make_node("Identity", ["no_probs"], [f"skip{s}_{name}"]) for name in outer]
    skip = helper.make_graph(nothing, f"skip{s}", [], ends(f"skip{s}"))
    number = graph.add("Cast", [f"active{s}"], f"active{s}_number", to=TensorProto.INT32)
    most = graph.add("ReduceMax", [number], f"active{s}_most", keepdims=0)
    graph.add("Cast", [most], f"active{s}_any", to=TensorProto.BOOL)
    graph.new.append(
        helper.make_node(
            "If", [f"active{s}_any"], outer, name=f"stage{s}", then_branch=then, else_branch=skip
        )
    )


def _add_answer(graph: _Split, stages: int) -> None:
    """The answer of the stage where each row stopped, and how many stages that took."""
    graph.constant(STOP, np.full(stages - 1, NEVER), np.float32)
    shape = graph.add("Shape", [graph.stages[0][0]], "probs_shape")
    graph.add("ConstantOfShape", [shape], "no_probs")
    for node in graph.main:
        for places in (node.input, node.output):
            places[:] = ["full_probs" if name == "probs" else name for name in places]
    answer = "full_probs"
    for s in reversed(range(stages - 1)):
        answer = graph.add(
            "Where", [f"exit{s}_rows", f"exit{s}_probs", answer], f"answer{s}" if s else "probs"
        )
    counts = [
        graph.add("Cast", [f"active{s}"], f"active{s}_count", to=TensorProto.INT64)
        for s in range(1, stages)
    ]
    one = graph.constant("one_stage", 1, np.int64)
    total = counts[0]
    for s, count in enumerate(counts[1:], 2):
        total = graph.add("Add", [total, count], f"asked_{s}")
    graph.add("Add", [total, one], STAGES_USED)
