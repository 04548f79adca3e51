"""Small protocols of streams and events as the plugin uses them, each with errors that can be put into it by name.

Every run checks what its kernels read against the records they should have read, and raises ``CorruptionError``.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tests.device.virtual import CorruptionError, Memory, VirtualDevice, VirtualEvent, VirtualStream

Protocol = Callable[[int, str | None], None]
Bug = str | None

RECORD_BYTES = 4
EMPTY = 255


class Machine:
    """A virtual device and the records of its model in registered host memory."""

    def __init__(self, order: int, layers: int, experts: int):
        self.device = VirtualDevice(order)
        self.numbers = np.random.default_rng(order)
        self.copies = self.device.stream("copies")
        self.host = 1 + np.repeat(np.arange(layers * experts, dtype=np.uint8), RECORD_BYTES)
        self.device.register(self.host)
        self.records = torch.from_numpy(self.host).view(layers, experts, RECORD_BYTES)

    def rows(self, *shape: int) -> torch.Tensor:
        return self.device.allocate(int(np.prod(shape)) * RECORD_BYTES).view(*shape, RECORD_BYTES)

    def table(self, *shape: int) -> torch.Tensor:
        table = self.device.allocate(int(np.prod(shape))).view(*shape)
        table[:] = EMPTY
        return table

    def choose(self, experts: int, count: int) -> list[int]:
        return self.numbers.choice(experts, count, replace=False).tolist()

    def moe(self, layer: int, chosen: Sequence[int], reads: Callable[[], list[Memory]]) -> None:
        """A kernel whose first reads have to be the records of ``chosen``, in this order."""
        wanted = [1 + layer * self.records.shape[1] + expert for expert in chosen]

        def check(values: list[Memory]) -> None:
            if [torch.as_tensor(value).tolist() for value in values[: len(wanted)]] != [
                [w] * RECORD_BYTES for w in wanted
            ]:
                raise CorruptionError(f"layer {layer} computed with other records")

        self.device.kernel(self.device.main, reads, check, name="moe")


class Residency:
    """Which expert is in which slot of one layer, for a host that decides; evicts round robin."""

    def __init__(self, slots: int):
        self.expert_of = [EMPTY] * slots
        self.next = 0

    def serve(self, experts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Slots of ``experts``, and (expert, slot) of those that have to be loaded."""
        loads = []
        for expert in experts:
            if expert not in self.expert_of:
                while self.expert_of[self.next % len(self.expert_of)] in experts:
                    self.next += 1
                slot = self.next % len(self.expert_of)
                self.expert_of[slot] = expert
                loads.append((expert, slot))
        return [self.expert_of.index(expert) for expert in experts], loads


def host_managed(order: int, bug: Bug, layers: int = 3, experts: int = 6, slots: int = 3, steps: int = 4) -> None:
    """The host waits for a layer's experts, has absent ones copied, sends the slots; speculative loads go on."""
    machine = Machine(order, layers, experts)
    device, main, copies = machine.device, machine.device.main, machine.copies
    speculation = device.stream("speculative loads")
    windows = machine.rows(layers, slots)
    residency = [Residency(slots) for _ in range(layers)]
    written: list[list[VirtualEvent | None]] = [[None] * slots for _ in range(layers)]
    read: list[list[VirtualEvent | None]] = [[None] * slots for _ in range(layers)]
    ids, ids_host = device.allocate(2), device.allocate_pinned(2)
    chosen_slots, slots_host = device.allocate(2), device.allocate_pinned(2)

    def bring(layer: int, expert: int, slot: int, stream: VirtualStream) -> None:
        for events, without in ((read, "no wait for reader"), (written, "no wait for older copy")):
            if (event := events[layer][slot]) is not None and bug != without:
                device.wait(stream, event)
        if bug == "event before copy":
            written[layer][slot] = device.record(stream)
        device.copy(stream, windows[layer, slot], machine.records[layer, expert])
        if bug != "event before copy":
            written[layer][slot] = device.record(stream)

    for _ in range(steps):
        for layer in range(layers):
            routed = machine.choose(experts, 2)
            device.kernel(main, lambda: [], lambda _, routed=routed: ids.copy_(torch.tensor(routed)), lambda: [ids])
            device.copy(main, ids_host, ids)
            if bug != "no wait for ids":
                device.synchronize(device.record(main))
            chosen = [min(expert, experts - 1) for expert in ids_host.tolist()]
            if chosen[0] == chosen[1]:
                raise CorruptionError("the host read experts that had not arrived")
            found, loads = residency[layer].serve(chosen)
            for expert, slot in loads:
                bring(layer, expert, slot, copies)
            slots_host[:] = torch.tensor(found)
            device.copy(copies if bug == "slots on copy stream" else main, chosen_slots, slots_host)
            for slot in found:
                if (event := written[layer][slot]) is not None and bug != "no wait for copy":
                    device.wait(main, event)
            used = windows[layer]
            machine.moe(
                layer, routed, lambda used=used: [*(used[s] for s in chosen_slots.tolist() if s < slots), chosen_slots]
            )
            for slot in found:
                read[layer][slot] = device.record(main)
            target = (layer + 1) % layers
            speculative = int(machine.numbers.integers(experts))
            _, speculated = residency[target].serve([speculative])
            for expert, slot in speculated:
                bring(target, expert, slot, speculation)
    device.drain()


def stage(order: int, bug: Bug, layers: int = 6, experts: int = 3) -> None:
    """A wide step: all experts of a layer are copied to one of two stages while the layer before is computed."""
    machine = Machine(order, layers, experts)
    device, main, copies = machine.device, machine.device.main, machine.copies
    stages = machine.rows(2, experts)
    read: list[VirtualEvent | None] = [None, None]
    filled: list[VirtualEvent | None] = [None, None]

    def fill(layer: int) -> None:
        which = layer % 2
        awaited = read[1 - which] if bug == "reader of other stage" else read[which]
        if awaited is not None and bug != "no wait for reader":
            device.wait(copies, awaited)
        for expert in range(experts):
            if bug == "event before last copy" and expert == experts - 1:
                filled[which] = device.record(copies)
            device.copy(copies, stages[which, expert], machine.records[layer, expert])
        if bug != "event before last copy":
            filled[which] = device.record(copies)

    for _ in range(2):
        fill(0)
        for layer in range(layers):
            awaited = filled[1 - layer % 2] if bug == "fill of other stage" else filled[layer % 2]
            if awaited is not None and bug != "no wait for copy":
                device.wait(main, awaited)
            if bug == "reader recorded early":
                read[layer % 2] = device.record(main)
            if layer + 1 < layers:
                fill(layer + 1)
            machine.moe(layer, range(experts), lambda which=layer % 2: list(stages[which]))
            if bug != "reader recorded early":
                read[layer % 2] = device.record(main)
    device.drain()


class DeviceTables:
    """Managers of windows on the device: which expert is in which slot is known to its kernels only."""

    def __init__(self, machine: Machine, layers: int, experts: int, slots: int, rows: torch.Tensor):
        self.machine, self.experts, self.slots, self.rows = machine, experts, slots, rows
        self.table = machine.table(layers, slots)

    def manage(self, layer: int, chosen: Sequence[int], stream: VirtualStream, plan: dict[str, list]) -> None:
        """Enqueue the decision: ``plan`` gets the rows of ``chosen`` and the (expert, row) to load."""
        table = self.table[layer]

        def decide(values: list[Memory]) -> None:
            row, loads = values[0].tolist(), []
            for expert in chosen:
                if expert not in row:
                    slot = next(slot for slot in range(self.slots) if row[slot] not in chosen)
                    row[slot] = expert
                    loads.append((expert, layer * self.slots + slot))
            table[:] = torch.tensor(row)
            plan["rows"] = [layer * self.slots + row.index(expert) for expert in chosen]
            plan["loads"] = loads

        self.machine.device.kernel(stream, lambda: [table], decide, lambda: [table], "manage")

    def gather(self, layer: int, stream: VirtualStream, plan: dict[str, list]) -> None:
        def write(_: list[Memory]) -> None:
            for expert, row in plan["loads"]:
                self.rows[row] = self.machine.records[layer, expert]

        targets: Callable[[], list[Memory]] = lambda: [self.rows[row] for _, row in plan["loads"]]  # noqa: E731
        self.machine.device.kernel(stream, lambda: [], write, targets, "gather")


def lent_stages(order: int, bug: Bug, layers: int = 6, experts: int = 4, slots: int = 2, steps: int = 5) -> None:
    """Wide steps use two stages that are the last windows; narrow steps use all windows."""
    machine = Machine(order, layers, experts)
    device, main, copies = machine.device, machine.device.main, machine.copies
    total = layers * slots
    rows = machine.rows(total)
    tables = DeviceTables(machine, layers, experts, slots, rows)
    begins = (total - experts, total - 2 * experts)
    first_lent = begins[1] // slots

    def narrow() -> None:
        for layer in range(layers):
            chosen, plan = machine.choose(experts, 2), {}
            tables.manage(layer, chosen, main, plan)
            tables.gather(layer, main, plan)
            machine.moe(layer, chosen, lambda plan=plan: [rows[row] for row in plan["rows"]])

    def wide() -> None:
        read: list[VirtualEvent | None] = [None, None]
        filled: list[VirtualEvent | None] = [None, None]
        if bug != "no wait at begin":
            device.wait(copies, device.record(main))
        if bug != "no reset":
            lent = tables.table[first_lent + 1 if bug == "one window not reset" else first_lent :]
            device.kernel(main, lambda: [], lambda _: lent.fill_(EMPTY), lambda: [lent], "reset")

        def start(layer: int) -> None:
            which = layer % 2
            if (event := read[which]) is not None and bug != "no wait for reader":
                device.wait(copies, event)
            for expert in range(experts):
                device.copy(copies, rows[begins[which] + expert], machine.records[layer, expert])
            filled[which] = device.record(copies)

        start(0)
        for layer in range(layers):
            device.wait(main, filled[layer % 2])
            if layer + 1 < layers or bug == "fill beyond last layer":
                start((layer + 1) % layers)
            shown = rows[begins[layer % 2] :][:experts]
            machine.moe(layer, range(experts), lambda shown=shown: list(shown))
            read[layer % 2] = device.record(main)

    for step in range(steps):
        narrow() if step % 2 == 0 else wide()
    device.drain()


def side_stream(
    order: int, bug: Bug, layers: int = 5, experts: int = 6, slots: int = 3, ahead: int = 2, steps: int = 4
) -> None:
    """Speculative loads in a step: forked after a layer's loads, one goes ahead, joined before its manager."""
    machine = Machine(order, layers, experts)
    device, main, side = machine.device, machine.device.main, machine.device.stream("side")
    rows = machine.rows(layers * slots)
    tables = DeviceTables(machine, layers, experts, slots, rows)
    joins: dict[int, VirtualEvent] = {}

    def speculate(target: int) -> None:
        if bug != "no fork":
            device.wait(side, device.record(main))
        plan: dict[str, list] = {}
        table, expert = tables.table[target], int(machine.numbers.integers(experts))
        victim = int(machine.numbers.integers(slots))

        def decide(values: list[Memory]) -> None:
            plan["loads"] = [] if expert in values[0].tolist() else [(expert, target * slots + victim)]
            table[:] = values[0]
            if plan["loads"]:
                table[victim] = expert

        device.kernel(side, lambda: [table], decide, lambda: [table], "speculative load")
        if bug == "join before fill":
            joins[target] = device.record(side)
        tables.gather(target, side, plan)
        if bug != "join before fill":
            joins[target] = device.record(side)

    for _ in range(steps):
        joins.clear()
        for layer in range(layers):
            chosen, plan = machine.choose(experts, 2), {}
            if layer in joins and bug not in ("no join", "join after manager"):
                device.wait(main, joins[layer])
            tables.manage(layer, chosen, main, plan)
            if layer in joins and bug == "join after manager":
                device.wait(main, joins[layer])
            tables.gather(layer, main, plan)
            if bug == "speculative load for own layer":
                speculate(layer)
            elif layer + ahead < layers:
                speculate(layer + ahead)
            machine.moe(layer, chosen, lambda plan=plan: [rows[row] for row in plan["rows"]])
        device.wait(main, device.record(side))
    device.drain()


BUGS: dict[Protocol, tuple[str, ...]] = {
    host_managed: (
        "no wait for copy",
        "no wait for older copy",
        "no wait for ids",
        "event before copy",
        "slots on copy stream",
    ),
    stage: (
        "no wait for copy",
        "no wait for reader",
        "reader of other stage",
        "fill of other stage",
        "event before last copy",
        "reader recorded early",
    ),
    lent_stages: (
        "no wait at begin",
        "no wait for reader",
        "no reset",
        "one window not reset",
        "fill beyond last layer",
    ),
    side_stream: ("no fork", "no join", "join before fill", "join after manager", "speculative load for own layer"),
}
"""Errors that some order shows. That of ``host_managed`` without a wait for readers is not one: the wait for ids
implies it."""
