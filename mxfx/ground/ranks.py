"""Several processes that do one run together, as ``torchrun`` starts them; with one, everything here is the identity.

Every rank runs the same program on the same pipeline and meets the others in the calls below, in the same order. What
is added up is added in the order of the ranks, so that a run with as many ranks gives the same bits again and every
rank holds the same. Only the first rank writes and prints. No process waits for one that ended: the first to notice
says so, and all end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mxfx.ground.errors import CheckError
from mxfx.ground.interrupt import end_at_once

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_K = TypeVar("_K")
#: Elements that are added up at one time: each rank holds as many of every other.
_PIECE = 1 << 24
#: Nobody waits so long for one that lives: the first writes and proves a model while the others wait.
_PATIENCE = timedelta(hours=12)
_ENDED = (
    "another process of this run ended, so this one does too; start the same command again: it goes on from the last "
    "checkpoint (finished layers; distill writes its own with checkpoint_every)"
)


class RankError(CheckError, RuntimeError):
    """The processes of a run cannot go on together."""


@dataclass
class _Together:
    rank: int = 0
    world: int = 1
    first: bool = True
    several: bool = False
    """Whether there are others, even while this one works alone."""


_now = _Together()


def rank() -> int:
    """Which of the processes this is, from 0."""
    return _now.rank


def world() -> int:
    """How many processes do the run."""
    return _now.world


def is_first() -> bool:
    """Whether this process writes and prints."""
    return _now.first


def start() -> None:
    """Join the processes that ``torchrun`` started, if it did; a CUDA device of its own becomes each one's current one.

    Where ``OMP_NUM_THREADS`` is 1, as ``torchrun`` sets it for want of a wish, each process takes its share of the
    host's cores: host memory is touched and copied by as many threads. Another number stays.

    Raises ``RankError`` if there are fewer devices than processes of this host.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ:
        return
    import torch
    from torch import distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise RankError(f"process {local} of this host has no CUDA device: there are {devices}; start fewer")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    _now.rank, _now.world = dist.get_rank(), dist.get_world_size()
    _now.first = _now.rank == 0
    _now.several = True
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", str(_now.world)))))
    end_at_once(signal.SIGTERM, _last)
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)


def stop() -> None:
    """Part from the others."""
    if _now.world == 1:
        return
    from torch import distributed as dist

    _now.rank, _now.world = 0, 1
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process is the one that says why a run ended: the first of those that ask. It can print again."""
    if _now.world == 1:
        return True
    from torch import distributed as dist

    sys.stderr = sys.__stderr__
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"mxfx-ended-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    except RuntimeError:
        return is_first()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work that only some of the ranks do, or each by itself: they do not meet inside."""
    before = (_now.rank, _now.world)
    _now.rank, _now.world = 0, 1
    try:
        yield
    finally:
        _now.rank, _now.world = before


def recording() -> Literal["global", "thread_local"]:
    """How strictly CUDA graphs are recorded (``capture_error_mode``): NCCL's own thread asks its events at any time,
    which a recording in mode "global" forbids.
    """
    return "thread_local" if _now.several else "global"


def share(count: int) -> slice:
    """This rank's part of ``count`` things in a row: parts are as equal as can be, earlier ranks have the larger."""
    return _share(count, _now.rank)


def _share(count: int, rank: int) -> slice:
    each, more = divmod(count, _now.world)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in the order of the ranks, in place; every rank gets the same bits.

    Each rank adds up its share and gives it to the others: twice the tensor's bytes come to it, however many there are.
    """
    if _now.world == 1:
        return tensor
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)
    for piece in flat.split(_PIECE):
        piece.copy_(joined(scattered(piece), 0, len(piece)))
    return tensor if tensor.is_contiguous() else tensor.copy_(flat.view_as(tensor))


def scattered(flat: Tensor) -> Tensor:
    """This rank's ``share`` of the sum over all ranks of a 1-dim tensor, added in the order of the ranks."""
    if _now.world == 1:
        return flat
    from torch import distributed as dist

    sizes = [len(range(len(flat))[_share(len(flat), rank)]) for rank in range(_now.world)]
    parts = flat.new_empty(_now.world, sizes[_now.rank])
    with _together():
        dist.all_to_all_single(parts.view(-1), flat, [sizes[_now.rank]] * _now.world, sizes)
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def joined(part: Tensor, dim: int, count: int | None = None) -> Tensor:
    """The parts of all ranks along ``dim``, of ``count`` together as ``share`` divides it; without it, of any sizes."""
    if _now.world == 1:
        return part
    import torch
    from torch import distributed as dist

    if part.dtype == torch.bool:
        return joined(part.view(torch.uint8), dim, count).view(torch.bool)
    leading = part.movedim(dim, 0)
    if count is None:
        sizes = collected(len(leading))
    else:
        sizes = [len(range(count)[_share(count, rank)]) for rank in range(_now.world)]
    # All ranks give as much; what is too much is cut off again.
    padded = leading.new_zeros(max(sizes), *leading.shape[1:])
    padded[: len(leading)] = leading
    parts = [torch.empty_like(padded) for _ in range(_now.world)]
    with _together():
        dist.all_gather(parts, padded)
    return torch.cat([found[:size] for found, size in zip(parts, sizes, strict=True)]).movedim(0, dim).contiguous()


def filled(whole: Tensor) -> Tensor:
    """A 1-dim tensor of equal parts, one a rank and each rank's own in its place, gets those of all; in place."""
    if _now.world > 1:
        from torch import distributed as dist

        # Its name until torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with _together():
            # Backends differ in whether a part may lie in what is written.
            gather(whole, whole.view(_now.world, -1)[_now.rank].clone())
    return whole


def collected(value: _T) -> list[_T]:
    """Every rank's value, in their order. For small things: they go through host memory."""
    if _now.world == 1:
        return [value]
    from torch import distributed as dist

    found: list[Any] = [None] * _now.world
    with _together():
        dist.all_gather_object(found, value)
    return found


def merged(found: dict[_K, _T]) -> dict[_K, _T]:
    """Every rank's entries as one dictionary, in the order of the ranks: of things that were spread by ``share``."""
    return {key: value for of_rank in collected(found) for key, value in of_rank.items()}


def from_all(value: float) -> float:
    """The mean of what all ranks have, the same on each."""
    return value if _now.world == 1 else sum(collected(value)) / _now.world


def from_first(make: Callable[[], _T]) -> _T:
    """What ``make`` gives on the first rank, on all of them; an error there is an error everywhere."""
    if _now.world == 1:
        return make()
    from torch import distributed as dist

    found: list[Any] = [None, None]
    if is_first():
        try:
            with alone():
                found[0] = make()
        except Exception as error:
            found[1] = error
    with _together():
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def sent(tensor: Tensor) -> None:
    """Write the first rank's bytes into every rank's tensor."""
    if _now.world == 1:
        return
    from torch import distributed as dist

    with _together():
        dist.broadcast(tensor, 0)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """A meeting of all ranks, which fails where one of them ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"{_ENDED} (process {_now.rank} of {_now.world})") from error


def _last() -> int:
    """What a process says, and ends with, on SIGTERM: ``torchrun`` sends it when another one ended."""
    if speaks():
        print(f"error: {_ENDED}", file=sys.__stderr__, flush=True)
    return RankError.exit_code
