"""Build a cascade into an ONNX graph: members run one after another, on the rows still unsure.

onnxruntime computes the whole graph whatever outputs are requested (measured, docs/LOG.md), so the
later members are inside `If` nodes. A second input, `stop`, holds the margin at which an image
stops after each stage. Its default is a margin that nothing reaches: a caller who passes only
images gets the answer of the full ensemble, from the same arithmetic as without a cascade.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from threefold.ensembles.cascade import NEVER, Cascade
from threefold.errors import ExportError
from threefold.predictions.checks import FLOOR

STOP: Final = "stop"
"""Input float (stages - 1,): the margin at which an image stops after each stage."""
STAGES_USED: Final = "stages_used"
"""Output int64 (b,): how many stages of the cascade ran for each image."""


def add_cascade(model: Any, cascade: Cascade, networks: Sequence[Sequence[str]]) -> Any:
    """Return a copy of a model with a cascade built in.

    Args:
        model: ONNX, images -> probs, member_probs, with a value `m{i}_probs` (b, k) per member.
        cascade: fitted, of these members.
        networks: of `onnx_graph.network_names`.

    Raises:
        ExportError: the cascade has other members, or a stage has no nodes of its own.
    """
    if sorted(i for stage in cascade.stages for i in stage) != list(range(len(networks))):
        raise ExportError(
            "the cascade is of other members", expected=len(networks), got=cascade.stages
        )
    copy = ir.from_proto(model)
    _Builder(copy.graph, cascade, networks).build()
    copy.graph.sort()
    return ir.to_proto(copy)


class _Builder:
    """Adds the nodes of a cascade to a graph, in any order."""

    def __init__(
        self, graph: ir.Graph, cascade: Cascade, networks: Sequence[Sequence[str]]
    ) -> None:
        self.graph, self.cascade, self.tape = graph, cascade, ir.tape.Tape(graph)
        self.values = ir.convenience.create_value_mapping(graph)
        self.stages = [
            [self.values[name] for i in stage for name in networks[i]] for stage in cascade.stages
        ]

    def op(self, kind: str, inputs: Sequence[Any], name: str, **attributes: Any) -> Any:
        """Add a node with one output of the same name; returns the output."""
        return self.tape.op(kind, inputs, attributes, name=name, output=ir.Value(name=name))

    def constant(self, name: str, value: Any, dtype: Any) -> Any:
        """Return the initializer of that name; add it if it is new."""
        if name not in self.graph.initializers:
            self.tape.initializer(ir.tensor(np.asarray(value, dtype), name=name))
        return self.graph.initializers[name]

    def build(self) -> None:
        """Add an exit after each stage except the last, and a branch for each except the first."""
        exits = len(self.stages) - 1
        thresholds = ir.tensor(np.full(exits, NEVER, np.float32), name=STOP)
        self.graph.inputs.append(self.tape.initializer(thresholds))
        shape = self.op("Shape", [self.stages[0][0]], "probs_shape")
        zeros = self.op("ConstantOfShape", [shape], "no_probs")
        needs = [_ancestors(outputs) for outputs in self.stages]
        early: list[Any] = []
        sure: list[Any] = []
        active: list[Any] = []
        for s in range(1, exits + 1):
            early.append(self.add_exit(s - 1))
            sure.append(self.add_test(s - 1, early[-1]))
            unsure = self.op("Not", [sure[-1]], f"exit{s - 1}_unsure")
            if s == 1:
                active.append(unsure)
            else:
                active.append(self.op("And", [active[-1], unsure], f"active{s}"))
            shared = set().union(*(need for other, need in enumerate(needs) if other != s))
            self.add_branch(s, [n for n in needs[s] if n not in shared], active[-1], zeros)
        self.add_answer(early, sure)
        self.add_stages_used(active)

    def add_exit(self, s: int) -> Any:
        """Add the answer after stage s: the calibrated mean of the members so far."""
        members = [i for stage in self.cascade.stages[: s + 1] for i in stage]
        mean = self.op("Mean", [self.values[f"m{i}_probs"] for i in members], f"exit{s}_mean")
        floor = self.constant("floor", FLOOR, np.float32)
        logs = self.op("Log", [self.op("Max", [mean, floor], f"exit{s}_max")], f"exit{s}_log")
        inverse = self.constant(
            f"exit{s}_inverse_temperature", 1 / self.cascade.temperatures_[s], np.float32
        )
        logits = self.op("Mul", [logs, inverse], f"exit{s}_mul")
        return self.op("Softmax", [logits], f"exit{s}_probs", axis=-1)

    def add_test(self, s: int, probs: Any) -> Any:
        """Add the test whether the answer after stage s is sure enough, for each row."""
        two = self.constant("two", [2], np.int64)
        largest, _ = self.tape.op_multi_out(
            "TopK",
            [probs, two],
            name=f"exit{s}_topk",
            outputs=[ir.Value(name=f"exit{s}_largest"), ir.Value(name=f"exit{s}_indices")],
        )
        first, second = self.constant("place0", 0, np.int64), self.constant("place1", 1, np.int64)
        top = self.op("Gather", [largest, first], f"exit{s}_top", axis=1)
        runner_up = self.op("Gather", [largest, second], f"exit{s}_runner_up", axis=1)
        margin = self.op("Sub", [top, runner_up], f"exit{s}_margin")
        place = self.constant(f"place{s}", s, np.int64)
        stop = self.op("Gather", [self.graph.initializers[STOP], place], f"exit{s}_stop", axis=0)
        return self.op("GreaterOrEqual", [margin, stop], f"exit{s}_sure")

    def add_branch(self, s: int, nodes: Sequence[Any], active: Any, zeros: Any) -> None:
        """Move a stage's nodes into an `If` that runs them on the active rows; others get zeros."""
        inside, outputs = set(nodes), self.stages[s]
        if any(output.producer() not in inside for output in outputs):
            raise ExportError(
                "a stage of the cascade shares all of its nodes with others",
                got=[output.name for output in outputs],
            )
        tape = ir.tape.Tape()
        positions = tape.op("NonZero", [active])
        index = tape.op("Squeeze", [positions, self.constant("axis_first", [0], np.int64)])
        axis_last = self.constant("axis_last", [1], np.int64)
        places = tape.op("Unsqueeze", [index, axis_last])
        weights = []
        inputs = dict.fromkeys(value for node in nodes for value in node.inputs)
        for value in inputs:
            if value is None or value.producer() in inside:
                continue
            if not value.is_initializer():
                rows = tape.op("Gather", [value, index], {"axis": 0})
                for node, i in tuple(value.uses()):
                    if node in inside:
                        node.replace_input_with(i, rows)
            elif inside.issuperset(value.consumers()):
                weights.append(self.graph.initializers.pop(value.name))
        self.graph.remove(nodes)
        results = []
        for output in outputs:
            results.append(ir.Value(name=output.name))
            output.replace_all_uses_with(results[-1])
            output.name = f"{output.name}_active"
        scattered = [tape.op("ScatterND", [zeros, places, output]) for output in outputs]
        skip = ir.tape.Tape()
        skipped = [skip.op("Identity", [zeros]) for _ in outputs]
        for value in (*scattered, *skipped):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        number = self.op("Cast", [active], f"active{s}_number", to=ir.DataType.INT32)
        largest = self.op("ReduceMax", [number], f"active{s}_max", keepdims=0)
        self.tape.op_multi_out(
            "If",
            [self.op("Cast", [largest], f"active{s}_any", to=ir.DataType.BOOL)],
            {
                "then_branch": ir.Graph(
                    [],
                    scattered,
                    nodes=[*tape.nodes, *nodes],
                    initializers=weights,
                    name=f"stage{s}",
                ),
                "else_branch": ir.Graph([], skipped, nodes=skip.nodes, name=f"skip{s}"),
            },
            name=f"stage{s}",
            outputs=results,
        )

    def add_answer(self, early: Sequence[Any], sure: Sequence[Any]) -> None:
        """Add the answer: that of the first sure stage, otherwise that of the full ensemble."""
        place = next(i for i, output in enumerate(self.graph.outputs) if output.name == "probs")
        full = self.graph.outputs[place]
        full.name = "full_probs"
        axis_last = self.constant("axis_last", [1], np.int64)
        answer = full
        for s in reversed(range(len(sure))):
            rows = self.op("Unsqueeze", [sure[s], axis_last], f"exit{s}_rows")
            answer = self.op("Where", [rows, early[s], answer], f"answer{s}" if s else "probs")
        answer.type, answer.shape = full.type, full.shape
        self.graph.outputs[place] = answer

    def add_stages_used(self, active: Sequence[Any]) -> None:
        """Add the output that counts the stages that ran for each row."""
        total = self.constant("one_stage", 1, np.int64)
        for s, rows in enumerate(active, 1):
            count = self.op("Cast", [rows], f"active{s}_count", to=ir.DataType.INT64)
            name = STAGES_USED if s == len(active) else f"stages{s}"
            total = self.op("Add", [count, total], name)
        total.type, total.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch"])
        self.graph.outputs.append(total)


def _ancestors(values: Iterable[Any]) -> dict[Any, None]:
    """Return the nodes that the values depend on, as an ordered set."""
    nodes: dict[Any, None] = {}
    pending = [value.producer() for value in values]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes[node] = None
            pending.extend(node.predecessors())
    return nodes
