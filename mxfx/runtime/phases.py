"""A prefill whose program is another than decode's: it fills a cache of its own, which is handed over to decode's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxfx.formats import Format, parse
from mxfx.formats.stored import restore
from mxfx.graph.phases import Held, held
from mxfx.graph.program import Program
from mxfx.ops.cache import slots_held, write_cache
from mxfx.runtime.cache import KVCache, Storage, cache_specs


@dataclass(frozen=True)
class _Handed:
    """Keys or values of one attention, in the cache of the prefill and in decode's."""

    there: Held
    here: Held
    onto: Format | None
    dtype: torch.dtype

    def over(self, source: Storage, target: Storage, slots: Tensor) -> None:
        """What the prefill stored of ``slots``, into decode's cache: rounded once to decode's format if so agreed."""
        _put(target, self.here, slots, _rounded(_get(source, self.there, slots, self.dtype), self.onto))

    def back(self, source: Storage, target: Storage, slots: Tensor) -> None:
        """What decode's cache holds of ``slots``, for the prefill to read on: on its grid if its cache holds codes."""
        numbers, stored = _get(source, self.here, slots, self.dtype), self.there.stored
        _put(target, self.there, slots, _rounded(numbers, None if stored is None else parse(stored)))


class Prefill:
    """Runs the prefill's graph for a cache that is decode's.

    After each call decode's cache holds the new tokens; what a later prefill (a chunk, a next turn of a chat) sees of
    earlier tokens is what decode's cache holds of them. Of its own tokens it sees what its own program writes. Where
    both programs have the same cache, nothing is handed over and the graph works on it.
    """

    def __init__(self, program: Program) -> None:
        assert program.phases is not None
        decode = program.phases.decode
        self.specs = cache_specs(program)
        self._handed = tuple(
            _Handed(there, here, None if onto is None else parse(onto), program.dtype)
            for there, here, onto in zip(held(program), held(decode), program.phases.onto, strict=True)
        )
        moved = any(one.onto is not None or one.there.stored != one.here.stored for one in self._handed)
        self.own = moved or self.specs != cache_specs(decode)

    def __call__(
        self,
        graph: nn.Module,
        cache: KVCache,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        given: dict[str, Tensor],
    ) -> Tensor:
        """Logits ``(batch, seq, vocabulary)``; ``cache`` has room and is filled, its length is the caller's to set.

        ``given`` are further inputs of the graph.
        """
        if not self.own:
            logits: Tensor = graph(ids, positions, mask, **cache.inputs(ids.shape[1]), **given)
            return logits
        assert cache.storage is not None
        past, total = cache.length, cache.length + ids.shape[1]
        mine = Storage.make(self.specs, len(ids), total, cache.storage.ring, cache.device)
        for one in self._handed:
            if past:
                one.back(cache.storage, mine, _last(past, cache.storage.tensors[one.here.cache]))
        slots = torch.arange(past, total, device=cache.device)
        logits = graph(ids, positions, mask, slots=slots, **mine.views(total), **given)
        for one in self._handed:
            found = _last(total, mine.tensors[one.there.cache])
            one.over(mine, cache.storage, found[found >= past])
        return logits


def _last(length: int, tensor: Tensor) -> Tensor:
    """The slots that a cache of ``length`` tokens holds: all, or under a window the last ones."""
    found = slots_held(torch.tensor([length - 1], device=tensor.device), tensor.shape[2])
    return found[found >= 0].sort().values


def _get(storage: Storage, one: Held, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of ``slots``, ``(batch, heads, slots, width)``."""
    cache = storage.tensors[one.cache]
    rows = cache.index_select(2, slots % cache.shape[2])
    if one.stored is None:
        return rows
    scales = storage.tensors[one.scales].index_select(2, slots % cache.shape[2])
    return restore(rows, scales, parse(one.stored), one.width, dtype)


def _put(storage: Storage, one: Held, slots: Tensor, numbers: Tensor) -> None:
    """Numbers, which lie on the grid whose codes the cache holds, if it holds codes."""
    fmt = None if one.stored is None else parse(one.stored)
    scales = storage.tensors[one.scales] if one.scales else None
    write_cache(storage.tensors[one.cache], scales, numbers, slots, fmt)


def _rounded(numbers: Tensor, onto: Format | None) -> Tensor:
    return numbers if onto is None else onto.fake_quantize(numbers, axis=-1)
