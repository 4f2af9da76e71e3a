"""Runs a workflow: what is needed and nothing else, each result once.

It pulls. An output that is in the cache needs nothing before it; what is missing waits for what it is joined to. Nodes
that are coroutines and ready run side by side, plain functions in turn. ComfyUI's behaviour is the specification of
lists, lazy inputs, blocked outputs, expansion and events.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from inspect import isawaitable
from typing import Any

from mahlstick.errors import MahlstickError
from mahlstick.nodes.cache import Cache, Entry, canonical, key
from mahlstick.nodes.graph import Graph, Kinds, Link, LiveGraph, Step, call_with, parse, prepare
from mahlstick.nodes.progress import Interrupted, Listener, listening
from mahlstick.nodes.schema import Blocked, Input, NodeType, Returned

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds after which a run that waits for its nodes looks whether it was stopped
_WIDE = 200  # characters of an input in an error

Listen = Callable[[str, dict[str, Any]], None]


class NodeFailed(MahlstickError):
    """A node that failed while the workflow ran. ``data`` is what ComfyUI sends as ``execution_error``."""

    def __init__(self, sentence: str, data: dict[str, Any]) -> None:
        self.data = data
        super().__init__(sentence)

    @property
    def node_id(self) -> str:
        """The node of the workflow; of a node that another one added, that other one."""
        return str(self.data["node_id"])

    @property
    def node_type(self) -> str:
        return str(self.data["node_type"])


@dataclass
class Outcome:
    """What a run did.

    ``executed``: the ids of the nodes that ran, in order. ``cached``: those that need not run, for their results, or
    those of all that needs them, were there. ``ui``: what nodes showed, by id. ``outputs``: of each target, for each
    output, the list of its values. ``error``: why it ended early, if it did.
    """

    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    ui: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    outputs: dict[str, tuple[list[Any], ...]] = field(default_factory=dict)
    error: NodeFailed | Interrupted | None = None


class Engine:
    """Runs workflows of some kinds of nodes.

    ``cache`` keeps results from one run to the next. ``stamp``, called with what a node showed, tells of what that
    rests on, such as the files that it names: where the stamp has become another, the node runs again. ``around`` is
    entered around each call of a plain function.
    """

    def __init__(
        self,
        nodes: Mapping[str, NodeType],
        cache: Cache | None = None,
        *,
        stamp: Callable[[Mapping[str, Any]], str] = lambda shown: "",
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.nodes = nodes
        self.cache = cache
        self.stamp = stamp
        self.around = around

    def run(
        self,
        workflow: Graph | Mapping[str, Any],
        targets: Iterable[str] | None = None,
        *,
        listen: Listen | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Run a graph, or a workflow in API form: its output nodes, or the nodes ``targets``.

        ``listen(event, data)`` hears ComfyUI's events, without ``prompt_id`` and ``timestamp``, and beside them
        ``preview`` with a PIL ``image`` of a ``node``. ``extra_pnginfo`` is for nodes that save it with their pictures.
        Setting ``stop`` interrupts the run between nodes and wherever a node reports its progress.

        A node's failure is in the outcome. Raises :class:`InvalidGraph`, before anything runs.
        """
        wait = self.run_async(workflow, targets, listen=listen, extra_pnginfo=extra_pnginfo, stop=stop)
        return _in_thread(wait) if _has_loop() else asyncio.run(wait)

    async def run_async(
        self,
        workflow: Graph | Mapping[str, Any],
        targets: Iterable[str] | None = None,
        *,
        listen: Listen | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """:meth:`run` within an event loop, which plain functions among the nodes block while they run."""
        graph = dict(workflow) if all(isinstance(each, Step) for each in workflow.values()) else parse(workflow)
        kinds = Kinds(self.nodes)
        prepared, outputs = prepare(graph, kinds, targets)
        run = _Run(self, kinds, LiveGraph(prepared, graph), listen or _ignore, stop or threading.Event(), extra_pnginfo)
        return await run.run(outputs)


@dataclass
class _Grown:
    """What the calls of a node gave that expanded, with links for what is still to come, and the nodes it added."""

    outputs: list[tuple[Any, ...]]
    ui: Mapping[str, Any]
    added: list[str] = field(default_factory=list)


class _Keys:
    """By what the result of each node is known."""

    def __init__(self, kinds: Kinds, graph: LiveGraph) -> None:
        self._kinds = kinds
        self._graph = graph
        self._found: dict[str, str | None] = {}

    def __getitem__(self, each: str) -> str | None:
        """The key of a node, found after those of all before it."""
        ahead, opened = [each] if each not in self._found else [], set()
        while ahead:
            here = ahead[-1]
            links = self._kinds.links(self._graph.steps[here])
            missing = [link.node for _, link in links if link.node not in self._found]
            if missing and here not in opened:
                opened.add(here)
                ahead += missing
            else:  # within a cycle, which comes out later, some stay missing
                ahead.pop()
                if here not in self._found:
                    self._found[here] = self._key(here)
        return self._found[each]

    def _key(self, each: str) -> str | None:
        step = self._graph.steps[each]
        node, known = self._kinds[step.kind], self._kinds.inputs(step.kind)
        given = {name: value for name, value in step.inputs.items() if name in known}
        links = {name: value for name, value in given.items() if isinstance(value, Link)}
        constants = {name: self._content(each, name, value) for name, value in given.items() if name not in links}
        if "UNIQUE_ID" in node.hidden.values():
            constants["UNIQUE_ID"] = each
        upstream = {name: (self._found.get(link.node), link.slot) for name, link in links.items()}
        return key(node, constants, upstream, _fingerprint(node, {**given, **dict.fromkeys(links)}))

    def _content(self, each: str, name: str, value: Any) -> str | None:
        """A constant as text. An object that an expansion brought is known by the node that expanded."""
        text, parent = canonical(value), self._graph.get_parent_node_id(each)
        if text is not None or parent is None or self._found[parent] is None:
            return text
        return f"{name} of {each.removeprefix(parent)} in {self._found[parent]}"


class _Agenda:
    """The nodes that are pending, those that each still waits for, and those that are ready to run."""

    def __init__(self) -> None:
        self._waits_for: dict[str, set[str]] = {}
        self._waiting: dict[str, list[str]] = {}
        self._urgent: set[str] = set()
        self._ready: tuple[deque[str], deque[str]] = (deque(), deque())

    def __contains__(self, each: object) -> bool:
        return each in self._waits_for

    def __len__(self) -> int:
        return len(self._waits_for)

    def add(self, each: str, urgent: bool) -> None:
        """A node that is pending; an ``urgent`` one goes before others."""
        self._waits_for[each] = set()
        if urgent:
            self._urgent.add(each)

    def wait(self, each: str, nodes: Iterable[str]) -> None:
        """Let a node wait for those of the nodes that are pending."""
        self._waits_for[each] = {node for node in nodes if node in self._waits_for}
        for node in self._waits_for[each]:
            self._waiting.setdefault(node, []).append(each)
        if not self._waits_for[each]:
            self._get_ready(each)

    def finish(self, each: str) -> None:
        del self._waits_for[each]
        for other in self._waiting.pop(each, ()):
            self._waits_for[other].discard(each)
            if not self._waits_for[other]:
                self._get_ready(other)

    def next(self) -> str | None:
        """The next node to run, if there is one."""
        return next((found.popleft() for found in self._ready if found), None)

    def cycle(self) -> list[str]:
        """Nodes that wait for each other, where nothing is ready or running."""
        way: dict[str, None] = {}
        each = next(iter(self._waits_for))
        while each not in way:
            way[each] = None
            each = min(self._waits_for[each])
        return [*way][[*way].index(each) :]

    def _get_ready(self, each: str) -> None:
        self._ready[each not in self._urgent].append(each)


class _Run:
    """One run: the results that are there, and for each pending node those that it still waits for."""

    def __init__(
        self,
        engine: Engine,
        kinds: Kinds,
        graph: LiveGraph,
        listen: Listen,
        stop: threading.Event,
        pnginfo: Mapping[str, Any] | None,
    ) -> None:
        self.engine = engine
        self.kinds = kinds
        self.graph = graph
        self.listen = listen
        self.stop = stop
        self.pnginfo = pnginfo
        self.itself = asyncio.current_task()
        self.outcome = Outcome()
        self.here = ""  # the node that was running when the run was stopped
        self.keys = _Keys(kinds, graph)
        self.agenda = _Agenda()
        self.entries: dict[str, Entry] = {}
        self.made: dict[str, Entry] = {}  # by key
        self.makers: dict[str, str] = {}  # by key, the first node that has it
        self.passing: set[str] = set()  # nodes whose results must not outlive the run
        self.grown: dict[str, _Grown] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.finished: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()

    async def run(self, targets: Sequence[str]) -> Outcome:
        """Run all that the targets need."""
        self.listen("execution_start", {})
        hits = self.need(targets)
        self.outcome.cached += self.spared(hits)
        self.listen("execution_cached", {"nodes": list(self.outcome.cached)})
        for each in hits:
            self.show(each, self.entries[each].shown)
        try:
            await self.work()
        except NodeFailed as error:
            self.fail(error)
        except Interrupted as error:
            self.outcome.error = error
            self.listen("execution_interrupted", self.place(self.here))
        finally:
            await self.cancel()
        if self.outcome.error is None:
            self.listen("execution_success", {})
        ran = set(self.outcome.executed)
        self.outcome.cached = [each for each in dict.fromkeys(self.outcome.cached) if each not in ran]
        self.outcome.outputs = {each: self.entries[each].outputs for each in targets if each in self.entries}
        return self.outcome

    async def work(self) -> None:
        """Run what is ready until nothing is pending."""
        while self.agenda:
            each = self.agenda.next()
            if each is None:
                await self.wait_for_task()
            elif self.node(each).is_async:
                task = asyncio.create_task(self.execute(each), name=each)
                task.add_done_callback(self.finished.put_nowait)
                self.tasks.add(task)
            else:
                await self.execute(each)
            if self.tasks:
                await asyncio.sleep(0)
            while not self.finished.empty():
                self.conclude(self.finished.get_nowait())

    async def wait_for_task(self) -> None:
        if not self.tasks:
            raise self.stuck()
        self.look_for_stop(next(iter(self.tasks)).get_name())
        with suppress(TimeoutError):
            self.conclude(await asyncio.wait_for(self.finished.get(), _POLL))

    def conclude(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if task.cancelled():  # by itself: we cancel those only that nobody waits for any more
            raise self.failure(task.get_name(), MahlstickError("It was cancelled."), {})
        task.result()

    async def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def look_for_stop(self, each: str) -> None:
        """Raise ``Interrupted`` where the run was stopped, be it by Ctrl-C."""
        if self.stop.is_set() or (self.itself and self.itself.cancelling()):
            self.here = each
            raise Interrupted(f"The run was stopped at node {each}.")

    # What is needed

    def pull(self, each: str, nodes: Sequence[str]) -> None:
        """Let a pending node wait for others, and these be made."""
        hits = self.need(nodes)
        self.outcome.cached += hits
        for hit in hits:
            self.show(hit, self.entries[hit].shown)
        self.agenda.wait(each, nodes)

    def need(self, nodes: Sequence[str]) -> list[str]:
        """Make nodes pending, with all that they need. Returns those whose results were there."""
        hits: list[str] = []
        added: dict[str, list[str]] = {}
        ahead = [*nodes][::-1]
        while ahead:
            each = ahead.pop()
            if each in self.entries or each in self.agenda:
                continue
            entry = self.find(each)
            if entry is not None:
                self.entries[each] = entry
                hits.append(each)
            else:
                node = self.node(each)
                self.agenda.add(each, urgent=node.is_output or node.is_async)
                added[each] = self.before(each)
                ahead += added[each][::-1]
        for each, before in added.items():
            self.agenda.wait(each, before)
        return hits

    def before(self, each: str) -> list[str]:
        """What a node must wait for: what its eager inputs are joined to, or another node that makes the same."""
        key = self.keys[each]
        maker = each if key is None else self.makers.setdefault(key, each)
        if maker != each:
            return [maker]
        return [link.node for one, link in self.kinds.links(self.graph.steps[each]) if not one.lazy]

    def find(self, each: str) -> Entry | None:
        """The result of a node, where it was made before and what it showed rests on the same."""
        key = self.keys[each]
        if key is None:
            return None
        cache = self.engine.cache
        entry = self.made.get(key) or (cache.get(key) if cache else None)
        return entry if entry and entry.stamps == self.stamps(entry.shown) else None

    def spared(self, hits: Iterable[str]) -> list[str]:
        """The nodes whose results are there, and those before them that need not run."""
        found = dict.fromkeys(hits)
        ahead = list(found)
        while ahead:
            links = self.kinds.links(self.graph.steps[ahead.pop()])
            fresh = [link.node for _, link in links if link.node not in found and link.node not in self.agenda]
            found |= dict.fromkeys(fresh)
            ahead += fresh
        return list(found)

    # How a node runs

    async def execute(self, each: str) -> None:
        """Run a node, or find out what else it must wait for."""
        values: dict[str, list[Any]] = {}
        try:
            if each in self.grown:
                self.finish_grown(each)
            elif self.keys[each] in self.made:
                self.take_over(each)
            else:
                self.look_for_stop(each)
                values |= self.values(each)
                more = await self.asked(each, values)
                if more:
                    self.pull(each, more)
                else:
                    await self.call(each, _calls(self.node(each), values))
        except Interrupted:
            self.here = each
            raise
        except Exception as error:
            raise self.failure(each, error, values) from error

    def values(self, each: str) -> dict[str, list[Any]]:
        """The values of each input, a list of one where it is a constant; None where a lazy one is not there yet."""
        step, node = self.graph.steps[each], self.node(each)
        known = self.kinds.inputs(step.kind)
        found = {name: self.value(known[name], value) for name, value in step.inputs.items() if name in known}
        hidden: dict[str, Callable[[], Any]] = {
            "PROMPT": self.graph.get_original_prompt,
            "EXTRA_PNGINFO": lambda: self.pnginfo,
            "UNIQUE_ID": lambda: each,
            "DYNPROMPT": lambda: self.graph,
        }
        return found | {name: [hidden[what]()] for name, what in node.hidden.items()}

    def value(self, one: Input, value: Any) -> list[Any]:
        if not isinstance(value, Link):
            return [value]
        if one.options.get("rawLink"):  # for ComfyUI's loops, which look at the graph itself
            return [list(value)]
        return self.outputs_of(value) if value.node in self.entries else [None]

    def outputs_of(self, link: Link) -> list[Any]:
        outputs = self.entries[link.node].outputs
        if not 0 <= link.slot < len(outputs):
            kind = self.graph.steps[link.node].kind
            raise MahlstickError(f"Node {link.node} ({kind}) gave {len(outputs)} outputs, and no number {link.slot}.")
        return outputs[link.slot]

    async def asked(self, each: str, values: Mapping[str, list[Any]]) -> list[str]:
        """The nodes behind those lazy inputs that the node asks for and that are not there."""
        node, step = self.node(each), self.graph.steps[each]
        lazy = {one.name: link.node for one, link in self.kinds.links(step) if link.node not in self.entries}
        if not node.needs or not lazy:
            return []
        asked: set[str] = set()
        for inputs in _calls(node, values):
            if _block(node, inputs) is None:
                answer = call_with(node.needs, inputs)
                asked |= set(await answer if isawaitable(answer) else answer or ())
        for name in asked - set(step.inputs):
            raise MahlstickError(f"It asks for its input {name}, which the workflow leaves out.")
        return [link for name, link in lazy.items() if name in asked]

    async def call(self, each: str, calls: Sequence[Mapping[str, Any]]) -> None:
        """Call a node's function once for each set of inputs, and take what it gives."""
        node = self.node(each)
        blocks = [_block(node, inputs) for inputs in calls]
        blocked = Returned((Blocked(),) * len(node.outputs))
        found = [blocked] * len(calls)
        free = [index for index, block in enumerate(blocks) if block is None]
        if free:
            display = self.graph.get_display_node_id(each)
            self.listen("executing", {"node": each, "display_node": display})
            with listening(self.listener(each, display)):
                results = await self.results(each, [calls[index] for index in free])
            self.outcome.executed.append(each)
            for index, result in zip(free, results, strict=True):
                found[index] = result
        messages = {block.message: None for block in blocks if block and block.message is not None}
        for message in messages:
            self.passing.add(each)  # the next run must say it again
            self.fail(self.blocked(each, message))
        self.take(each, found)

    async def results(self, each: str, calls: Sequence[Mapping[str, Any]]) -> list[Returned]:
        node = self.node(each)
        function = node.bind()

        async def result(inputs: Mapping[str, Any]) -> Returned:
            self.look_for_stop(each)
            try:
                with self.engine.around():
                    found = function(**inputs)
                found = await found if isawaitable(found) else found
            except SystemExit as error:  # which would end a server's thread without a word
                raise MahlstickError(f"It tried to end the program ({error}).") from error
            return _whole(node, node.returned(found))

        if not node.is_async:
            return [await result(inputs) for inputs in calls]
        tasks = [asyncio.ensure_future(result(inputs)) for inputs in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def take(self, each: str, results: Sequence[Returned]) -> None:
        """Take what the calls of a node gave."""
        ui = _joined(result.ui for result in results if result.ui)
        if ui:
            self.show(each, {"": ui})
        if any(result.expand is not None for result in results):
            self.grow(each, results, _Grown([], ui))
        else:
            outputs = self.merged(each, [result.outputs for result in results])
            self.finish(each, self.entry(outputs, {"": ui} if ui else {}))

    def grow(self, each: str, results: Sequence[Returned], found: _Grown) -> None:
        """Add the graphs to which a node expands, and let it wait for their results."""
        for call, result in enumerate(results):
            if result.expand is None:
                found.outputs.append(result.outputs)
                continue
            for inner in result.expand.values():
                if inner["class_type"] not in self.kinds:
                    raise MahlstickError(f"It expands to {inner['class_type']}, which is unknown here.")
            names = self.graph.add(each, call, result.expand)
            found.added += names.values()
            links = [self.graph.resolve(value, names) for value in result.outputs]
            found.outputs.append(
                tuple(
                    value if isinstance(value, Link) and value.node in self.graph.steps else plain
                    for value, plain in zip(links, result.outputs, strict=True)
                )
            )
        self.grown[each] = found
        links = [value.node for outputs in found.outputs for value in outputs if isinstance(value, Link)]
        inner = [*links, *(one for one in found.added if self.node(one).is_output)]
        self.pull(each, inner)

    def finish_grown(self, each: str) -> None:
        grown = self.grown.pop(each)
        shown = {"": grown.ui} if grown.ui else {}
        for inner in grown.added:
            if inner in self.entries:
                shown |= {inner.removeprefix(each) + below: ui for below, ui in self.entries[inner].shown.items()}
        if not self.passing.isdisjoint(grown.added):
            self.passing.add(each)
        self.finish(each, self.entry(self.merged(each, grown.outputs), shown))

    def take_over(self, each: str) -> None:
        """Take the result of another node that made the same."""
        self.outcome.cached.append(each)
        entry = self.made[self.keys[each] or ""]
        self.show(each, entry.shown)
        self.finish(each, entry)

    def merged(self, each: str, calls: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
        """For each output the list of its values in all calls."""
        outputs = self.node(each).outputs
        found: list[list[Any]] = []
        for slot in range(min([len(outputs), *map(len, calls)])):
            values: list[Any] = []
            for value in (call[slot] for call in calls):
                if isinstance(value, Link):
                    values += self.outputs_of(value)
                elif outputs[slot].is_list and not isinstance(value, Blocked):
                    values += value
                else:
                    values.append(value)
            found.append(values)
        return tuple(found)

    def entry(self, outputs: tuple[list[Any], ...], shown: Mapping[str, Mapping[str, Any]]) -> Entry:
        return Entry(outputs, shown, self.stamps(shown))

    def stamps(self, shown: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return [self.engine.stamp(ui) for ui in shown.values()]

    def finish(self, each: str, entry: Entry) -> None:
        """Put a node's result where the others find it."""
        self.entries[each] = entry
        key = self.keys[each]
        before = [link.node for _, link in self.kinds.links(self.graph.steps[each])]
        if not self.passing.isdisjoint([*before, self.makers.get(key or "", "")]):
            self.passing.add(each)
        if key is not None and key not in self.made:
            self.made[key] = entry
            if each not in self.passing and self.engine.cache is not None:
                self.engine.cache.put(key, entry)
        self.agenda.finish(each)

    # What others hear of it

    def show(self, each: str, shown: Mapping[str, Mapping[str, Any]]) -> None:
        display = self.graph.get_display_node_id(each)
        for below, ui in shown.items():
            self.outcome.ui[each + below] = ui
            self.listen("executed", {"node": each + below, "display_node": display, "output": ui})

    def listener(self, each: str, display: str) -> Listener:
        def hear(value: int, total: int, preview: Any = None) -> None:
            self.look_for_stop(each)
            self.listen("progress", {"value": value, "max": total, "node": display})
            if preview is not None:
                self.listen("preview", {"image": preview, "node": each, "display_node": display})

        return hear

    def fail(self, error: NodeFailed) -> None:
        self.outcome.error = self.outcome.error or error
        self.listen("execution_error", error.data)

    def failure(self, each: str, error: Exception, values: Mapping[str, list[Any]]) -> NodeFailed:
        inside = f", in its {each} ({self.graph.steps[each].kind})" if self.graph.get_parent_node_id(each) else ""
        place = self.place(each)
        kind = type(error)
        data = {
            "exception_message": str(error),
            "exception_type": kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}",
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {name: [_shown(value) for value in found] for name, found in values.items()},
            "current_outputs": list(self.entries),
        }
        return NodeFailed(f"Node {place['node_id']} ({place['node_type']}){inside}: {error}", place | data)

    def blocked(self, each: str, message: str) -> NodeFailed:
        place = self.place(each)
        data = {
            "exception_message": f"Execution Blocked: {message}",
            "exception_type": "ExecutionBlocked",
            "traceback": [],
            "current_inputs": {},
            "current_outputs": list(self.entries),
        }
        return NodeFailed(f"Node {each} ({place['node_type']}) was blocked: {message}", place | data)

    def stuck(self) -> NodeFailed:
        cycle = self.agenda.cycle()
        names = " -> ".join(f"{each} ({self.graph.steps[each].kind})" for each in [*cycle, cycle[0]])
        return self.failure(cycle[0], MahlstickError(f"Nodes wait for each other: {names}."), {})

    def place(self, each: str) -> dict[str, Any]:
        """Where something happened, in the words of ComfyUI's events."""
        real = self.graph.get_real_node_id(each)
        return {"node_id": real, "node_type": self.graph.steps[real].kind, "executed": list(self.outcome.executed)}

    def node(self, each: str) -> NodeType:
        return self.kinds[self.graph.steps[each].kind]


def _calls(node: NodeType, values: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The inputs of each call: one for each value of the longest list, shorter ones repeating their last."""
    if node.takes_lists:
        return [{name: list(found) for name, found in values.items()}]
    if not all(values.values()):  # nothing to run it on
        return []
    count = max((len(found) for found in values.values()), default=1)
    return [{name: found[min(index, len(found) - 1)] for name, found in values.items()} for index in range(count)]


def _block(node: NodeType, inputs: Mapping[str, Any]) -> Blocked | None:
    """What keeps a call from running."""
    values = (each for value in inputs.values() for each in (value if node.takes_lists else [value]))
    return next((each for each in values if isinstance(each, Blocked)), None)


def _whole(node: NodeType, found: Returned) -> Returned:
    """What a node returned; one block in place of its outputs blocks all of them."""
    if len(found.outputs) == 1 and isinstance(found.outputs[0], Blocked):
        return replace(found, outputs=found.outputs * len(node.outputs))
    return found


def _joined(shown: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the calls of a node showed, each name's lists one after the other."""
    first, *others = [*shown] or [{}]
    found = dict(first)
    for ui in others:
        found |= {name: [*found.get(name, ()), *values] for name, values in ui.items()}
    return found


def _fingerprint(node: NodeType, values: Mapping[str, Any]) -> str | None:
    if node.fingerprint is None:
        return ""
    try:
        return canonical(call_with(node.fingerprint, values))
    except Exception as error:  # the node itself will say it better
        log.info("%s has no fingerprint (%s) and so runs again", node.name, error)
        return None


def _shown(value: Any) -> Any:
    """A value as errors show it."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value[:_WIDE]
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{'' if shape is None else f' {tuple(shape)}'}"


def _has_loop() -> bool:
    """Whether an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _in_thread(wait: Coroutine[Any, Any, Outcome]) -> Outcome:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, wait).result()


def _ignore(event: str, data: dict[str, Any]) -> None:
    pass
