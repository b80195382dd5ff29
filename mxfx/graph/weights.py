"""The weight store: copy on write, alias-aware, every change recorded."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mxfx.graph.filed import Files, short
from mxfx.ground.errors import MxfxError

#: Bytes hashed as one leaf; it decides the hash.
_LEAF = 1 << 20
#: Bytes that one task hashes: few tasks, for each of them takes Python's lock from a thread that feeds a device.
_PART = 4 * _LEAF
#: Bytes copied from a device at a time, through pinned memory: several times faster than what is not pinned.
_STAGE = 64 * _LEAF


class UnknownWeight(MxfxError, KeyError):
    """No weight of that name is in the store."""


@dataclass(frozen=True)
class WeightChange:
    """One entry of the ledger: which pass changed which tensor, with hashes and relative error ‖Δ‖/‖w‖."""

    pass_name: str
    weight: str
    before: str
    after: str
    error: float | None


@dataclass(frozen=True)
class _Pending:
    """A ``WeightChange`` whose figures are still on their way."""

    pass_name: str
    weight: str
    before: Callable[[], str]
    after: Callable[[], str]
    error: Tensor | None

    def get(self) -> WeightChange:
        error = None if self.error is None else float(self.error)
        return WeightChange(self.pass_name, self.weight, self.before(), self.after(), error)


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place, where torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def tensor_hash(tensor: Tensor, into: Tensor | None = None) -> str:
    """Blake2b (16 hex digits) over dtype, shape and bytes; ``meta`` for tensors without data.

    A tree of two levels: the bytes enter as the digests of their leaves, which threads share. The result does not
    depend on how many there are. The bytes are copied to ``into`` on the way, a contiguous tensor of that size.
    """
    if tensor.device.type == "meta":
        return "meta"
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    copy = None if into is None else into.reshape(-1).view(torch.uint8)
    for start in range(0, len(data), _STAGE):
        host = _on_host(data[start : start + _STAGE])
        if copy is not None:
            copy[start : start + _STAGE].copy_(host)
        stage = memoryview(host.numpy())
        parts = [stage[at : at + _PART] for at in range(0, len(stage), _PART)]
        for leaves in _threads().map(_leaf_digests, parts) if len(stage) > _LEAF else map(_leaf_digests, parts):
            digest.update(leaves)
    return digest.hexdigest()


def _on_host(data: Tensor) -> Tensor:
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data) if data.is_cuda else data.to("cpu")


def hash_beside(tensor: Tensor, into: Tensor | None = None) -> Future[str]:
    """``tensor_hash`` in a thread, and on CUDA on a stream, of its own: the caller's work goes on meanwhile."""
    ready = None
    if tensor.is_cuda:
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(tensor.device))

    def task() -> str:
        if ready is None:
            return tensor_hash(tensor, into)
        side = _side_stream(tensor.device)
        side.wait_event(ready)
        with torch.cuda.stream(side):
            return tensor_hash(tensor, into)

    return _beside().submit(task)


def _beside_work(tensor: Tensor, kept_on: torch.device | None) -> bool:
    """Whether a new weight is hashed, and brought home, beside the work: where a device would wait for it."""
    return tensor.is_cuda or (kept_on is not None and kept_on.type != tensor.device.type)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@cache
def _beside() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="mxfx-weights")


def _leaf_digests(data: memoryview) -> bytes:
    return b"".join(hashlib.blake2b(data[i : i + _LEAF], digest_size=16).digest() for i in range(0, len(data), _LEAF))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="mxfx-hash")


# Threads do not survive a fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)
    os.register_at_fork(after_in_child=_beside.cache_clear)


class WeightStore(Mapping[str, Tensor]):
    """Name → tensor, with an alias table for tied weights.

    Tensors are never written in place: ``set`` stores a new one and leaves the user's model alone. Stored copies
    are kept in ``working`` precision (float32; float64 in the twin on which promises are checked), so that a chain
    of exact rewrites does not drift in bfloat16.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        aliases: Mapping[str, str] | None = None,
        working: torch.dtype = torch.float32,
        constants: frozenset[str] = frozenset(),
    ) -> None:
        self._tensors = dict(tensors)
        #: Names of tensors that run in compute precision (float32 or better) in a model of any dtype.
        self.constants = constants
        self._aliases = dict(aliases or {})
        #: By identity, without keeping tensors alive that nobody else holds.
        self._hashes: dict[int, tuple[weakref.ref[Tensor], int, str | Future[str]]] = {}
        #: Tensors whose bytes are still on their way from a device.
        self._arriving: dict[str, Future[str]] = {}
        self.working = working
        #: Where new weights lie, if not in memory.
        self._files: Files | None = None
        self._ledger: list[WeightChange | _Pending] = []

    @property
    def ledger(self) -> list[WeightChange]:
        """Every change, in order."""
        found = [change.get() if isinstance(change, _Pending) else change for change in self._ledger]
        self._ledger = [*found]
        return found

    @ledger.setter
    def ledger(self, changes: list[WeightChange]) -> None:
        self._ledger = list(changes)

    def canonical(self, name: str) -> str:
        """The name that really holds the tensor behind ``name``."""
        found = self._aliases.get(name, name)
        if found not in self._tensors:
            raise UnknownWeight(f"no weight named {name!r} in a store of {len(self._tensors)}")
        return found

    def __getitem__(self, name: str) -> Tensor:
        home = self.canonical(name)
        if home in self._arriving:
            self._arriving.pop(home).result()
        return self._tensors[home]

    def behind(self, name: str) -> Tensor:
        """The tensor object behind a name, whether or not its bytes are there: to ask whether it is another one."""
        return self._tensors[self.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def items(self) -> ItemsView[str, Tensor]:
        self._settle()
        return self._tensors.items()

    def values(self) -> ValuesView[Tensor]:
        self._settle()
        return self._tensors.values()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._aliases

    @property
    def aliases(self) -> Mapping[str, str]:
        """Alias → canonical name, for tied weights."""
        return dict(self._aliases)

    def tied_to(self, name: str) -> tuple[str, ...]:
        """Every other name of the same tensor."""
        home = self.canonical(name)
        return tuple(n for n in (home, *(a for a, c in self._aliases.items() if c == home)) if n != name)

    def master(self, name: str) -> Tensor:
        """The tensor in working precision or better, for the arithmetic of a pass."""
        tensor = self[name]
        return tensor.to(self.working) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    def hash(self, name: str) -> str:
        """Of the tensor behind a name, computed once as long as nobody writes the tensor in place."""
        tensor = self.behind(name)
        known = self._known_hash(tensor)
        if known is None:
            self.trust_hash(name, tensor_hash(self[name]))
        elif isinstance(known, Future):
            self.trust_hash(name, known.result())
        return str(self._hashes[id(tensor)][-1])

    def _known_hash(self, tensor: Tensor) -> str | Future[str] | None:
        known = self._hashes.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        # One that is on its way is being written.
        return known[2] if isinstance(known[2], Future) or known[1] == version(tensor) else None

    def hash_later(self, name: str) -> Callable[[], str]:
        """What gives the hash of the tensor that stands behind a name now; it is computed beside the work."""
        tensor = self.behind(name)
        known = self._known_hash(tensor)
        found = hash_beside(self[name]) if known is None else known
        if known is None:
            self.trust_hash(name, found)
        return found.result if isinstance(found, Future) else lambda: found

    def trust_hash(self, name: str, found: str | Future[str]) -> None:
        """Take ``found`` for the hash of a weight, without computing it."""
        tensor = self.behind(name)
        self._hashes[id(tensor)] = (weakref.ref(tensor), version(tensor), found)

    def set(
        self, name: str, tensor: Tensor, by: str, *, kept_on: torch.device | None = None, was: Tensor | None = None
    ) -> None:
        """Put a new tensor behind ``name`` (and behind every alias of it); the change enters the ledger.

        It is kept on its own device or on ``kept_on``, where it comes to while the caller goes on. ``was`` is a copy of
        the former tensor on the device of the new one, if the caller has one. Raises ``UnknownWeight`` for a name that
        is not there: new weights come through ``add``.
        """
        home = self.canonical(name)
        before = self[home]
        after = self._kept(tensor)
        if after.data_ptr() == before.data_ptr() and after.device.type != "meta":
            after = after.clone()
        error = _relative_change(before if was is None else was, after)
        if _beside_work(after, kept_on):
            hashed = self.hash_later(home)
            self._set_beside(home, after.contiguous(), kept_on or after.device)
            self._ledger.append(_Pending(by, home, hashed, self.hash_later(home), error))
            return
        old_hash = self.hash(home)
        self._tensors[home] = after
        self._ledger.append(WeightChange(by, home, old_hash, self.hash(home), None if error is None else float(error)))

    def adopt(self, name: str, tensor: Tensor) -> None:
        """Take ``tensor`` for what the last change of a weight made: another process' result of the same pass."""
        home = self.canonical(name)
        self._tensors[home] = tensor
        changes = self.ledger
        index = max(i for i, change in enumerate(changes) if change.weight == home)
        self._ledger[index] = replace(changes[index], after=self.hash(home))

    def _settle(self) -> None:
        """Wait for every tensor that is on its way."""
        while self._arriving:
            self._arriving.popitem()[1].result()

    def _set_beside(self, home: str, after: Tensor, device: torch.device) -> None:
        there = device.type == after.device.type
        if not there and self._files is not None:
            after = short(after)
            kept = self._files.empty(after.shape, after.dtype)
        else:
            kept = after if there else torch.empty(after.shape, dtype=after.dtype, device=device)
        self._tensors[home] = kept
        found = hash_beside(after, None if there else kept)
        self.trust_hash(home, found)
        if not there:
            self._arriving[home] = found

    def add(self, name: str, tensor: Tensor, by: str, *, constant: bool = False) -> None:
        """Add a new weight (an untied head) or a ``constant`` of compute precision (a transform's matrix).

        Raises ``ValueError`` if the name is taken.
        """
        if name in self:
            raise ValueError(f"weight {name!r} exists; a new weight needs a new name")
        self._tensors[name] = self._kept(tensor)
        if constant:
            self.constants |= {name}
        self._ledger.append(WeightChange(by, name, "", self.hash(name), None))

    def _kept(self, tensor: Tensor) -> Tensor:
        """As stored: the order of its axes in memory does not tell by which arithmetic a pass came to it."""
        found = (tensor.to(self.working) if tensor.is_floating_point() else tensor).detach().contiguous()
        return self._files.hold(found) if self._files is not None and found.device.type == "cpu" else found

    def keep_in_files(self, folder: Path) -> None:
        """Let large new weights lie in mapped files under ``folder``, in bfloat16 where that loses nothing.

        For models of which the host's memory would not hold a second copy. They go with this process.
        """
        self._files = Files(folder)

    def add_transposed(self, name: str, view: str) -> None:
        """Let ``view`` name the transposed tensor of a weight, last two axes swapped; both share their memory."""
        self._tensors[view] = self[name].mT

    def add_rows(self, name: str, source: str, rows: Tensor, by: str) -> None:
        """Let ``name`` hold the ``rows``, int64 ``(n,)``, of a weight's first axis, in its dtype; a run of them shares
        its memory.
        """
        whole, first, count = self[source], int(rows[0]), len(rows)
        run = torch.equal(rows, torch.arange(first, first + count))
        self._tensors[name] = whole[first : first + count] if run else whole[rows.to(whole.device)]
        self._ledger.append(WeightChange(by, name, "", self.hash(name), None))

    def untie(self, alias: str, by: str) -> None:
        """Give an alias a tensor of its own, equal to the one that it shared until now."""
        tensor = self[alias]
        if alias not in self._aliases:
            others = self.tied_to(alias)
            if not others:
                raise ValueError(f"weight {alias!r} is not tied")
            heir, *rest = others
            self._tensors[heir] = tensor
            self._aliases = {a: c for a, c in self._aliases.items() if a != heir} | dict.fromkeys(rest, heir)
            self._ledger.append(WeightChange(by, heir, self.hash(alias), self.hash(alias), 0.0))
            return
        del self._aliases[alias]
        self._tensors[alias] = tensor
        self._ledger.append(WeightChange(by, alias, self.hash(alias), self.hash(alias), 0.0))

    def drop(self, name: str) -> None:
        """Forget a weight that no node reads any more."""
        home = self.canonical(name)
        del self._tensors[home]
        self.constants -= {home}
        self._aliases = {a: c for a, c in self._aliases.items() if c != home}

    def extended(self, constants: Mapping[str, Tensor]) -> WeightStore:
        """A store with these constants beside its weights, as if it had been made with them: no ledger entry."""
        self._settle()
        return WeightStore(
            {**self._tensors, **constants}, self._aliases, self.working, self.constants | frozenset(constants)
        )

    def copy(self) -> WeightStore:
        """A store that shares tensors with this one until either is changed."""
        self._settle()
        twin = WeightStore(self._tensors, self._aliases, self.working, self.constants)
        twin._files = self._files
        twin._hashes = self._hashes
        twin.ledger = list(self.ledger)
        return twin

    def share(self, name: str, tensor: Tensor) -> None:
        """Hold ``tensor``, which has the bits of a weight, in the place of that."""
        self._tensors[self.canonical(name)] = tensor

    def cast(self, dtype: torch.dtype) -> WeightStore:
        """The same weights with every floating tensor in ``dtype``, which also becomes the working precision."""
        twin = self.copy()
        twin.working = dtype
        # In files where new weights lie there: in float64 they are four times what a model in 16 bits is.
        twin._tensors = {n: twin._kept(t) if t.dtype != dtype else t for n, t in self._tensors.items()}
        return twin


def _relative_change(before: Tensor, after: Tensor) -> Tensor | None:
    """‖after - before‖ / ‖before‖, a scalar on the device of ``before``."""
    if before.device.type == "meta" or before.shape != after.shape or not before.is_floating_point():
        return None
    norm = torch.linalg.vector_norm(before, dtype=torch.promote_types(before.dtype, torch.float32))
    return torch.linalg.vector_norm(after.to(before.device).float() - before.float()) / norm.clamp_min(1e-30)
