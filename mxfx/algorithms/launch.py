"""A kernel bound to everything but its tensors, so that a call costs the host a few microseconds.

Triton's own launch specializes on each argument at every call, which for some thirty arguments takes longer than
the kernels run. Here it happens once for a shape; after that only pointers change.

Importable only where `triton` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

#: Shapes whose launches are kept; a program in eager mode meets a few dozen.
KEPT_SHAPES = 4096
_ALIGNMENT = 16
_SHARED_PER_PROGRAM = 1024
_REGISTERS = 65536
_REGISTER_UNIT = 8
_WARP = 32


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Where to launch what reads `x`: kernels launch on the current device, which need not be the tensor's."""
    device = x.get_device()  # -1: the interpreter's
    return torch.cuda.device(device) if device >= 0 and device != torch.cuda.current_device() else nullcontext()


class Launch:
    """`kernel` with its scalars and compile-time constants; call it with the tensors that come before them.

    Args:
        kernel: takes tensors first, then `scalars`, then, with `tasks`, turns (not specialized on), then constants.
        programs: programs to launch, given how many the device can run at a time.
        scalars: run-time arguments.
        constants: compile-time arguments by name. Of `STAGES`, operands on their way at a time, a device whose programs
            have too little shared memory gets fewer.
        tasks: what all programs have to do together; turns is its share of one of them. 0: no such argument.
        read_by_tiles: of the first tensors, what makes the descriptor that the kernel takes instead of a pointer.
        options: of the compiler (`num_warps`, `enable_fp_fusion`).

    A call raises triton's `OutOfResources` where even one stage needs more than a program may have.
    """

    def __init__(
        self,
        kernel: triton.JITFunction,
        programs: Callable[[int], int],
        scalars: tuple,
        constants: dict[str, object],
        tasks: int = 0,
        read_by_tiles: Sequence[Callable[[Tensor], object]] = (),
        **options: object,
    ) -> None:
        self._kernel = kernel
        self._programs = programs
        self._scalars = scalars
        self._constants = constants
        self._tasks = tasks
        self._read_by_tiles = read_by_tiles
        self._options = options
        self._compiles = isinstance(kernel, triton.JITFunction)  # else it is the interpreter's
        self._runners: dict[tuple, Callable] = {}

    def __call__(self, *tensors: Tensor) -> None:
        with on_device_of(tensors[0]):
            self._run(tensors)

    def _run(self, tensors: tuple[Tensor, ...]) -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        # What pointers point to, and whether they allow 16-byte loads, is compiled in.
        kinds = (
            *[pointer % _ALIGNMENT == 0 for pointer in pointers],
            *[tensor.dtype for tensor in tensors],
        )
        runner = self._runners.get(kinds)
        if runner is None:
            runner = self._runners[kinds] = self._prepare(tensors)
        # Of a tensor the launcher would ask the driver whether its memory is the device's.
        runner(*self._described(tensors, pointers if self._compiles else tensors))

    def _described(self, tensors: tuple[Tensor, ...], given: Sequence[object]) -> Sequence[object]:
        made = [describe(tensor) for describe, tensor in zip(self._read_by_tiles, tensors, strict=False)]
        return [*made, *given[len(made) :]] if made else given

    def _prepare(self, tensors: tuple[Tensor, ...]) -> Callable[..., None]:
        if not self._compiles:
            programs = self._programs(1)
            interpreted = self._kernel[(programs,)]
            given = {**self._constants, **self._options}
            return lambda *tensors: interpreted(*tensors, *self._with_turns(programs), **given)

        described = self._described(tensors, tensors)

        def compiles(constants: dict[str, object]) -> CompiledKernel:
            return self._kernel.warmup(*described, *self._with_turns(1), grid=(1,), **constants, **self._options)

        properties = torch.cuda.get_device_properties(tensors[0].device)
        limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # its stub lacks it
        compiled, constants = within(limit, compiles, self._constants)
        if compiled.metadata.shared > limit:
            return _refusal(compiled.metadata.shared, limit)
        assert compiled.run is not None  # loads it, and with that knows its registers
        programs = self._programs(_at_a_time(compiled, tensors[0].device))
        start, scalars = compiled[(programs, 1, 1)], self._with_turns(programs)
        names = self._kernel.arg_names[len(tensors) + len(scalars) :]
        rest = (*scalars, *(constants[name] for name in names))
        return lambda *pointers: start(*pointers, *rest)

    def _with_turns(self, programs: int) -> tuple:
        return (*self._scalars, triton.cdiv(self._tasks, programs)) if self._tasks else self._scalars


def within(
    limit: int, compiles: Callable[[dict[str, object]], CompiledKernel], constants: dict[str, object]
) -> tuple[CompiledKernel, dict[str, object]]:
    """A kernel with as many of its `STAGES` as `limit` bytes of shared memory allow, but one; and its constants."""
    compiled, stages = compiles(constants), constants.get("STAGES", 1)
    while compiled.metadata.shared > limit and isinstance(stages, int) and stages > 1:
        stages -= 1
        constants = {**constants, "STAGES": stages}
        compiled = compiles(constants)
    return compiled, constants


def _refusal(needed: int, limit: int) -> Callable[..., None]:
    def refuse(*pointers: int) -> None:
        raise OutOfResources(needed, limit, "shared memory")

    return refuse


def _at_a_time(compiled: CompiledKernel, device: torch.device) -> int:
    """Programs of a loaded kernel that run at the same time on a device."""
    limits = torch.cuda.get_device_properties(device)
    warps = compiled.metadata.num_warps
    registers = -(-compiled.n_regs // _REGISTER_UNIT) * _REGISTER_UNIT * _WARP * warps
    each = min(
        limits.shared_memory_per_multiprocessor // (compiled.metadata.shared + _SHARED_PER_PROGRAM),
        _REGISTERS // registers,
        limits.max_threads_per_multi_processor // (_WARP * warps),
    )
    return max(each, 1) * limits.multi_processor_count
