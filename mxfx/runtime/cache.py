"""The cache of an emitted model as transformers' ``Cache``: plain or packed tensors, rings under windows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from transformers import Cache

from mxfx.graph.program import Program
from mxfx.ground.errors import MxfxError
from mxfx.ops import cached_attend
from mxfx.ops.cache import CACHES, slots_held
from mxfx.ops.catalogue import spec

#: Places are allocated in multiples of this: a cache grows seldom. On a GPU, where steps are recorded for one room, few
#: rooms serve every length: powers of two up to the second number, then its multiples.
_STEP = 64
_GPU_STEP = 4096
#: Storages that a model keeps when their caches are gone, with the steps that were recorded on them.
_KEPT = 2


@dataclass(frozen=True)
class CacheSpec:
    """One tensor of a cache, ``(batch, heads, room, width)``; under a ``window`` a ring of so many places.

    ``first``: it holds as many tokens, those at the beginning of each text.
    """

    name: str
    heads: int
    width: int
    dtype: torch.dtype
    window: int | None
    first: int | None = None

    def places(self, room: int, ring: bool = True) -> int:
        """Places for a context of ``room`` tokens."""
        if self.first is not None:
            return self.first
        return room if self.window is None or not ring else min(room, self.window)


def cache_specs(program: Program) -> tuple[CacheSpec, ...]:
    """What a program's caches are made of; none for a program without ``insert-kv-cache``."""
    found: dict[str, CacheSpec] = {}
    shared: set[str] = set()
    for node in program.graph.nodes:
        if node.target not in (cached_attend, torch.ops.mxfx.cached_attention.default):
            continue
        given = spec(node).arguments()
        for cache in (given[name] for name in CACHES):
            if not isinstance(cache, fx.Node):
                continue
            _, heads, places, width = cache.meta["val"].shape
            first = places if isinstance(places, int) else None
            limits = [limit for limit in (given["window"], given["chunk"]) if limit is not None]
            window = min(limits, default=None)  # type: ignore[type-var]
            window = window if first is None else None
            found[str(cache.target)] = CacheSpec(
                str(cache.target), heads, width, cache.meta["val"].dtype, window, first
            )
            if given["writes"] is False:
                # The second reader comes when the first has written: what a ring pushed out would be missing.
                shared.add(str(cache.target))
    return tuple(
        CacheSpec(
            spec.name, spec.heads, spec.width, spec.dtype, None if spec.name in shared else spec.window, spec.first
        )
        for spec in found.values()
    )


def cache_bytes(specs: tuple[CacheSpec, ...], batch: int, context: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the cache of ``batch`` texts of ``context`` tokens.

    ``dtype`` is that of plain tensors where the program is not lowered, and theirs nominal.
    """
    each = {s: (dtype if dtype is not None and s.dtype.is_floating_point else s.dtype).itemsize for s in specs}
    return sum(batch * s.heads * s.places(context) * s.width * each[s] for s in specs)


class CacheError(MxfxError, ValueError):
    """A cache that does not fit what it is used for."""


class CacheOutOfMemory(MxfxError, RuntimeError):
    """There is no memory for a cache of the size asked for; the model and other caches are as they were."""


@dataclass
class Storage:
    """The tensors of a cache: ``room`` slots for ``batch`` texts; ``ring`` tells whether windows are rings.

    ``attached`` holds what was made for just these tensors (recorded decode steps).
    """

    specs: tuple[CacheSpec, ...]
    tensors: dict[str, Tensor]
    batch: int
    room: int
    ring: bool
    attached: dict[str, object] = field(default_factory=dict)

    @staticmethod
    def make(specs: tuple[CacheSpec, ...], batch: int, room: int, ring: bool, device: torch.device) -> Storage:
        """Zeroed tensors (what lies behind the last token is multiplied by zero). Raises ``CacheOutOfMemory``."""
        try:
            # Made for inference, no call outside of it could write to them.
            with torch.inference_mode(False):
                tensors = {
                    s.name: torch.zeros((batch, s.heads, s.places(room, ring), s.width), dtype=s.dtype, device=device)
                    for s in specs
                }
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                size = cache_bytes(specs, batch, room) / 1e9
                raise CacheOutOfMemory(
                    f"no memory on {device} for a cache of {size:.2f} GB ({batch} × {room:,} tokens); expected a "
                    "smaller batch or a shorter context (`mxfx check --context N --batch B` says what a cache takes)"
                ) from error
            raise
        return Storage(specs, tensors, batch, room, ring)

    def views(self, total: int) -> dict[str, Tensor]:
        """The tensors as far as ``total`` slots reach."""
        return {s.name: self.tensors[s.name][:, :, : s.places(total, self.ring)] for s in self.specs}


class KVCache(Cache):
    """Keys and values of all layers of an emitted model.

    Made by ``EmittedCausalLM.new_cache``, filled by its ``forward`` and handed from call to call as
    ``past_key_values``. ``room`` slots are allocated with the first token; more are added where they are needed.
    """

    def __init__(
        self,
        specs: tuple[CacheSpec, ...],
        device: torch.device,
        room: int = 0,
        kept: list[Storage] | None = None,
    ) -> None:
        # Not the base's constructor: its layers hold tensors of one kind and shape.
        self.layers: list = []
        self.offloading = False
        self.specs = specs
        self.device = device
        self.length = 0
        self.padded = False
        self._room = room
        self._ring = True
        self.storage: Storage | None = None
        self._kept = kept

    def __del__(self) -> None:
        kept, held = getattr(self, "_kept", None), getattr(self, "storage", None)
        # On a CPU a step is recorded as fast as it runs.
        if kept is not None and held is not None and held.attached and self.device.type == "cuda":
            kept.append(held)
            del kept[:-_KEPT]

    def __repr__(self) -> str:
        return f"KVCache({self.batch_size} × {self.length} of {self._room} tokens, {self.nbytes:,} bytes)"

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return 0 if self.storage is None else sum(t.nbytes for t in self.storage.tensors.values())

    def reserve(self, batch: int, seq: int) -> Storage:
        """The tensors, with places for ``seq`` more tokens of ``batch`` texts. Raises ``CacheError``."""
        total = self.length + seq
        held = self.storage
        if held is not None and held.batch != batch:
            raise CacheError(f"the cache holds {held.batch} texts, the call has {batch}; expected the same batch")
        if held is None or total > held.room or held.ring != self._ring:
            grown = 0 if held is None or total <= held.room else held.room + held.room // 2
            room = max(total, grown)
            self._replace(batch, _rounded(max(room, self._room), self.device))
        assert self.storage is not None
        return self.storage

    def _replace(self, batch: int, room: int) -> None:
        new = self._reused(batch, room) or Storage.make(self.specs, batch, room, self._ring, self.device)
        if self.storage is not None and self.length:
            for spec in self.specs:
                old, into = self.storage.tensors[spec.name], new.tensors[spec.name]
                if spec.first is not None:
                    into.copy_(old)
                else:
                    _move(old, into, self.length)
        self.storage, self._room = new, room

    def _reused(self, batch: int, room: int) -> Storage | None:
        """A storage of a cache that is gone, of the same size; those of another size make room."""
        for position, one in enumerate(self._kept or []):
            if (one.batch, one.room, one.ring) == (batch, room, self._ring):
                assert self._kept is not None
                del self._kept[position]
                for tensor in one.tensors.values():
                    tensor.zero_()
                return one
        if self._kept:
            self._kept.clear()
        return None

    def inputs(self, seq: int) -> dict[str, Tensor]:
        """What the graph takes: the slots of ``seq`` new tokens, and the caches up to the last of them."""
        assert self.storage is not None
        slots = torch.arange(self.length, self.length + seq, device=self.device)
        return {"slots": slots, **self.storage.views(self.length + seq)}

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + int(query_length), 0

    @property
    def batch_size(self) -> int:
        return -1 if self.storage is None else self.storage.batch

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.storage is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [spec.window is not None for spec in self.specs]

    @property
    def is_croppable(self) -> bool:
        return self._wrapped() is None

    def activate_past_recording(self) -> None:
        """From here on windows keep all that they saw, so that ``crop`` can give back what a ring would overwrite."""
        self._ring = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is, as of old, how many are kept.

        Raises ``CacheError`` where a ring has overwritten what would be the last tokens again.
        """
        kept = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.length)
        if kept < 0:
            raise CacheError(f"the cache holds {self.length} tokens, it cannot forget {-tokens_to_remove}")
        wrapped = self._wrapped()
        if kept < self.length and wrapped is not None:
            raise CacheError(
                f"the cache holds {self.length} tokens, the ring {wrapped.name} only the last {wrapped.window}; "
                "call activate_past_recording() before the first token"
            )
        self.length = kept

    def _wrapped(self) -> CacheSpec | None:
        if self.storage is None or not self.storage.ring:
            return None
        return next((s for s in self.specs if s.window is not None and self.length > s.window), None)

    def reset(self) -> None:
        self.length, self.padded = 0, False
        # What lies behind the last token is multiplied by zero, which a NaN would survive.
        for tensor in () if self.storage is None else self.storage.tensors.values():
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Text ``i`` goes on as text ``beam_idx[i]``."""
        if self.storage is None:
            return
        if len(beam_idx) != self.storage.batch:
            return self.batch_select_indices(beam_idx)
        index = beam_idx.to(self.device)
        for view in self.storage.views(self.length).values():
            view.copy_(view.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.storage is not None:
            self.batch_select_indices(torch.arange(self.storage.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.storage is None:
            return
        index = indices.to(self.device)
        held = self.storage
        with torch.inference_mode(False):
            tensors = {name: tensor.index_select(0, index) for name, tensor in held.tensors.items()}
        self.storage = Storage(self.specs, tensors, len(index), held.room, held.ring)


def _rounded(room: int, device: torch.device) -> int:
    if device.type != "cuda":
        return -(-room // _STEP) * _STEP
    return 1 << max(room - 1, _STEP).bit_length() if room <= _GPU_STEP else -(-room // _GPU_STEP) * _GPU_STEP


def _move(old: Tensor, new: Tensor, length: int) -> None:
    """The slots that ``old`` holds of ``length`` tokens, to their places in ``new``."""
    held = slots_held(torch.tensor([length - 1], device=old.device), old.shape[2])
    there = (held >= max(0, length - new.shape[2])).nonzero().flatten()
    new.index_copy_(2, held[there] % new.shape[2], old.index_select(2, there))
