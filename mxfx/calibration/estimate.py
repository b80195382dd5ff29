"""How much memory a calibration stream takes, before it runs: on the device, and for the values that wait.

The stages run on tensors without data, of the shapes that they will have, and what lives at one time is counted; the
solver's part is a formula over the sizes of its matrices. A test counts the tensors of real runs beside it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mxfx.algorithms.gptq_experts import SOLVED_AT_ONCE
from mxfx.algorithms.gptq_solver import rows_at_a_time
from mxfx.calibration.activations import Placement
from mxfx.calibration.expert_statistics import BUDGET
from mxfx.calibration.runner import execute_stage
from mxfx.calibration.schedule import Pass, Schedule
from mxfx.calibration.stages import Stage, cut
from mxfx.calibration.statistics import panel_width
from mxfx.graph.program import Program, compute_dtype

_META = torch.device("meta")
#: Of what is free, the share that a stream or a model may take: allocators leave gaps.
SHARE = 0.85


@dataclass(frozen=True)
class Footprint:
    """Bytes of a stream where each is at its largest.

    Attributes:
        running: on the device while a stage runs, values between stages waiting elsewhere.
        solving: on the device while a group is solved, beside values that wait there.
        resident: at most, with all values on the device, of which more wait there (``mxfx.calibration.schedule``).
        waiting: values of all samples between stages, elsewhere.
    """

    running: int = 0
    resident: int = 0
    solving: int = 0
    waiting: int = 0

    def device(self, placement: Placement) -> int:
        """At most, on the device."""
        return self.resident if placement == "device" else max(self.running, self.solving)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, until they are gone.

    What operations make for themselves counts too where it is large: CUDA's index by several tensors, on whatever
    device, spells each out where they differ in shape, eight bytes for every element of the result; a triangular
    solution copies a matrix that lies tight in neither order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self.note(value)
        if func is torch.ops.aten.index.Tensor:
            indices = [index for index in args[1] if index is not None]
            if len({index.shape for index in indices}) > 1:
                self.peak = max(self.peak, self.now + 8 * len(indices) * found.numel())
        if func is torch.ops.aten.linalg_solve_triangular.default:
            matrix = args[0]
            if not matrix.is_contiguous() and not matrix.mT.is_contiguous():
                self.peak = max(self.peak, self.now + matrix.nbytes)
        return found

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention that makes its result and nothing else, as fused kernels do; without data torch would spell it out."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def footprint(
    lowered: Program,
    targets: Collection[str],
    shape: tuple[int, int],
    *,
    device: torch.device,
    stored: Mapping[str, torch.dtype],
    batch_size: int,
    reference: bool = False,
) -> Footprint:
    """What ``stream_layers`` will take for tokens of ``shape`` when it runs this lowered program on ``device``.

    ``targets`` are names of linears; ``stored`` the dtypes in which the weights are stored (those of the program where
    nothing is said); ``reference`` counts a second stream beside it. Values count as waiting elsewhere: of them, two
    batches are on their way.
    """
    batches = -(-shape[0] // batch_size)
    stages = cut(lowered.graph, frozenset(targets))

    def found(placement: Placement) -> Footprint:
        tokens = (min(batch_size, shape[0]), shape[1])
        return _Simulation(lowered, stored, tokens, batches, device, reference).run(stages, placement)

    return replace(found("cpu"), resident=found("device").resident)


def place(found: Footprint, device: torch.device) -> Placement:
    """Where values wait: on the device if all of it fits there, else in host memory, else in files."""
    if found.device("device") <= SHARE * free_bytes(device):
        return "device"
    return "cpu" if device.type == "cuda" and found.waiting <= SHARE * host_bytes() else "disk"


def solver_bytes(rows: int, columns: int) -> int:
    """What GPTQ of linears that share an input takes on the device beside their stored weights, all together ``rows``.

    Of the factorization: the matrix, its copy in float64 and the factor, or matrix, factor, inverse, a slab of it and
    the inverses on the diagonal.
    Of the rounding: matrix and factor, each weight as it came and in the stack, and for the rows at hand the working
    copies, or the results and what chooses between them.
    """
    square, weight, at_once = columns * columns, rows * columns, rows_at_a_time(rows, columns)
    slab = (24 if columns <= 1024 else 32) * min(1024, columns) * columns
    factorization = max(20 * square, 16 * square + slab) + 8 * weight
    rounding = 8 * square + 8 * weight + 22 * at_once * columns + (8 * weight if at_once < rows else 0)
    return max(factorization, rounding)


def target_bytes(rows: int, columns: int) -> int:
    """What ``asymmetric_target`` takes beside the stored weights and the cross moment: the Hessian and, in float64, its
    copy and the factor, or the cross moment's copy; the weights in both precisions, two right sides and the step.
    """
    return 20 * columns * columns + 36 * rows * columns


class _Simulation:
    """Stages on tensors without data, one batch through each."""

    def __init__(
        self,
        program: Program,
        stored: Mapping[str, torch.dtype],
        tokens: tuple[int, int],
        batches: int,
        device: torch.device,
        reference: bool = False,
    ) -> None:
        self._program = program
        self._device = device
        self._batches = batches
        self._stored = stored
        #: Streams: with a reference a second one.
        self._of_both = 1 + reference
        self._env: dict[fx.Node, object] = {
            node: torch.empty(tokens, dtype=torch.int64, device=_META) if node.target == "input_ids" else None
            for node in program.graph.nodes
            if node.op == "placeholder"
        }

    def run(self, stages: list[Stage], placement: Placement) -> Footprint:
        found = Footprint()
        schedule = Schedule(stages, placement, self._device)
        for index in (index for index, stage in enumerate(stages) if stage.measured):
            for one in schedule.until(index):
                before = _bytes(self._env.values())
                measured = stages[index].measured if schedule.done == index else {}
                moved, work = self._running(one, schedule.next, measured)
                for node in one.over:
                    self._env.pop(node, None)
                # What a batch gives comes before what it was made of goes.
                given = self._of_both * _bytes(self._env.get(node) for node in one.outputs)
                waiting = self._of_both * self._batches * max(before, _bytes(self._env.values()))
                found = Footprint(
                    max(found.running, moved + work),
                    max(found.resident, waiting + self._of_both * work),
                    found.solving,
                    max(found.waiting, waiting + given),
                )
            # Weights of what runs again stay.
            solving = self._solving(stages[index]) + sum(map(self._size, schedule.pending))
            beside = self._of_both * self._batches * _bytes(self._env.values())
            found = replace(found, resident=max(found.resident, beside + solving), solving=max(found.solving, solving))
        return found

    def _running(self, one: Pass, following: Stage | None, measured: Collection[fx.Node]) -> tuple[int, int]:
        """Bytes of values that come and go, and of everything else while a pass runs."""
        stage = one.joined(bool(measured))
        weights = {node: self._weight(str(node.target)) for node in stage.weights}
        given = {node: self._env[node] for node in stage.inputs}
        watched = [node for node in measured if node in set(stage.nodes)]
        with torch.no_grad(), _FusedAttention(), LiveBytes() as live:
            env = execute_stage(stage, dict(given), weights, [*one.outputs, *watched])
        outputs = {node: env[node] for node in one.outputs}
        self._env |= outputs
        # Inputs of this batch and the next; outputs of the batch before, on their way (this one's are the work's).
        moved = min(2, self._batches) * _bytes(given.values()) + (self._batches > 1) * _bytes(outputs.values())
        widths = [int(node.meta["val"].shape[-1]) for node in watched]
        sums = sum(4 * n * n + 4 * min(panel_width(self._device), n) * n for n in widths)
        coming = 0 if following is None else self._size(following)
        return moved, live.peak + self._size(stage) + coming + sums

    def _solving(self, stage: Stage) -> int:
        """Of the group of a stage that takes most; the Hessians of the others wait beside it."""
        most = hessians = 0
        for source, linears in stage.measured.items():
            columns = int(source.meta["val"].shape[-1])
            shapes = [self._weight(str(node.target)).shape for node in _weights_of(linears, stage)]
            stacks = [shape for shape in shapes if len(shape) == 3]
            rows = sum(shape[0] for shape in shapes if len(shape) == 2)
            if rows:
                # With a reference a cross moment waits beside it.
                hessians += 4 * self._of_both * columns**2
                taken = solver_bytes(rows, columns)
                if self._of_both > 1:
                    # The weights that are aimed at are others than those that they come from.
                    taken = max(taken + 8 * rows * columns, target_bytes(rows, columns))
                most = max(most, taken - 4 * columns**2)
            if stacks:
                sums = 4 * min(shape[0] for shape in stacks) * columns**2
                most = max(most, min(sums, _budget(BUDGET, self._device)) + _budget(SOLVED_AT_ONCE, self._device))
        return hessians + most + self._size(stage)

    def _size(self, stage: Stage) -> int:
        """Bytes of the weights of a stage, as they come to the device; on a CPU they are there."""
        if self._device.type == "cpu":
            return 0
        names = {str(node.target) for node in stage.weights}
        return sum(self._weight(name).numel() * self._stored.get(name, self._program.dtype).itemsize for name in names)

    def _weight(self, name: str) -> Tensor:
        tensor = self._program.weights.behind(name)
        if not tensor.is_floating_point():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)
        constant = self._program.weights.canonical(name) in self._program.weights.constants
        dtype = compute_dtype(self._program.dtype) if constant else self._program.dtype
        return torch.empty(tensor.shape, dtype=dtype, device=_META)


def _weights_of(linears: Sequence[fx.Node], stage: Stage) -> list[fx.Node]:
    mine = set(stage.weights)
    return [source for node in linears for source in node.all_input_nodes if source in mine]


def _budget(of: Mapping[str, int], device: torch.device) -> int:
    return of.get(device.type, of["cpu"])


def _bytes(values: Any) -> int:
    storages = {v.untyped_storage()._cdata: v.numel() * v.itemsize for v in values if isinstance(v, Tensor)}
    return sum(storages.values())


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free; of a CPU, what this process may still take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_bytes()


def host_bytes() -> int:
    """Host memory that is free or can be made so, of the machine or of the part of it that this process may use."""
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return min(limit - used, _available())
    return _available()


def _available() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
