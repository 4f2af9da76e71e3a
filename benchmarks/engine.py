"""What the engine of workflows costs beside its nodes: `python -m benchmarks.engine [--nodes 1000] [--repeats 5]`.

The nodes do next to nothing, so that the time is the engine's. A chain has each node behind the last; in a wide graph
all are behind the first. "Again" is a second run of the same graph, for which everything is in memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

from mahlstick.nodes.cache import MemoryCache
from mahlstick.nodes.engine import Engine, Outcome
from mahlstick.nodes.graph import parse, validate
from mahlstick.nodes.schema import Returned, Socket, Widget, node

NumberT = Annotated[int, Socket("NUMBER")]


@node("benchmark")
def Number(*, value: Annotated[int, Widget(min=0, max=10**6)] = 0) -> NumberT:
    """Where a graph begins."""
    return value


@node("benchmark")
def Add(*, number: NumberT, more: int = 1, label: str = "") -> NumberT:
    """What a graph is made of."""
    return number + more


@node("benchmark", is_output=True)
def Show(*, number: NumberT) -> Returned:
    """Where a graph ends."""
    return Returned(ui={"number": [number]})


NODES = {each.name: each for each in (Number, Add, Show)}


def chain(count: int) -> dict[str, Any]:
    """``count`` nodes one behind the other."""
    steps = {str(index): _step("Add", number=[str(index - 1), 0], more=1, label="x") for index in range(1, count - 1)}
    return {"0": _step("Number", value=1)} | steps | {"end": _step("Show", number=[str(count - 2), 0])}


def wide(count: int) -> dict[str, Any]:
    """One node, and an output for each two of the others."""
    graph = {"0": _step("Number", value=1)}
    for index in range(count // 2):
        graph[f"a{index}"] = _step("Add", number=["0", 0], more=index, label="x")
        graph[f"b{index}"] = _step("Show", number=[f"a{index}", 0])
    return graph


def _step(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def milliseconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def measure(graph: dict[str, Any]) -> tuple[float, float, float]:
    """Milliseconds to read and validate a graph, to run it, and to run it again."""
    engine = Engine(NODES, MemoryCache(1 << 30))

    def run(executed: int) -> Outcome:
        outcome = engine.run(graph)
        assert outcome.error is None and len(outcome.executed) == executed
        return outcome

    checking = milliseconds(lambda: validate(parse(graph), NODES))
    return checking, milliseconds(lambda: run(len(graph))), milliseconds(lambda: run(0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the engine costs for each node, and to validate a workflow.")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    measure(chain(10))  # hints and code are read once in a process
    print(f"| {given.nodes} nodes | validate | run, each node | again, each node |\n|---|---|---|---|")
    for name, graph in (("chain", chain(given.nodes)), ("wide", wide(given.nodes))):
        measured = [measure(graph) for _ in range(given.repeats)]
        checking, running, again = (median(found) for found in zip(*measured, strict=True))
        cells = f"{checking:.0f} ms", f"{running / len(graph):.3f} ms", f"{again / len(graph):.3f} ms"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
