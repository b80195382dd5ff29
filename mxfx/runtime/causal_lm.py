"""The emitted graph as a causal LM of transformers: logits, ``generate``, lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx, nn
from transformers import AutoConfig, Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mxfx.graph.execute import execute
from mxfx.graph.feed import Feed
from mxfx.graph.module import build, build_phases
from mxfx.graph.phases import NO_CACHE, entries
from mxfx.graph.program import GENERATION, KEPT, Program
from mxfx.ground.phases import PHASES
from mxfx.ops import real_tokens
from mxfx.pipeline.emit import emitted
from mxfx.runtime.cache import CacheError, KVCache, Storage, cache_specs
from mxfx.runtime.decode import records, replayed
from mxfx.runtime.phases import Prefill

_COUNTS = (real_tokens, torch.ops.mxfx.real_tokens.default)


def emit(program: Program, device: torch.device | str = "cpu") -> fx.GraphModule:
    """Emit and build: ``gm(input_ids, position_ids=None, attention_mask=None)`` gives ``(batch, seq, vocabulary)``."""
    return build(emitted(program, device)).to(device)


def as_causal_lm(program: Program, device: torch.device | str = "cpu", *, whole: bool = True) -> EmittedCausalLM:
    """The program as a ``PreTrainedModel``: ``generate``, ``.logits``, ``HFLM(pretrained=…)``.

    With ``whole=False`` its weights stay where they lie and come to the device one after the other, in every call: for
    a model that the device does not hold.
    """
    if not whole:
        return EmittedCausalLM(emitted(program, device), torch.device(device))
    return EmittedCausalLM(emitted(program, device)).to(device)


class InPieces(nn.Module):
    """A lowered program that is run node by node, called as the module that ``build`` makes of it.

    Weights lie where they did; each comes to ``device`` for the nodes that read it, while those before it run.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        super().__init__()
        self.program = program
        self.device = device
        self._feed = Feed(program, device)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor:
        self._feed.start()
        return execute(self.program, input_ids, position_ids, attention_mask, feed=self._feed, others=others)


class EmittedCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps an emitted graph. With a cache (``use_cache=True`` or ``past_key_values``) it reads only new tokens.

    ``pieces_on`` is a device that the graph runs on in pieces; None builds the whole. ``consume`` gives the program's
    graph away: see ``mxfx.graph.module.build``.

    A program with phases has a graph for each: a call of one token that finds others in its cache is decode, any other
    is a prefill, as is every call without a cache. So what several tokens a call verify (assisted generation) is not
    what single steps would have written.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    base_model_prefix = "graph"

    def __init__(self, program: Program, pieces_on: torch.device | None = None, *, consume: bool = False) -> None:
        config, generation = configs_of(program)
        super().__init__(config)
        self._take(program, pieces_on, consume)
        config.use_cache = bool(self.specs)
        self.generation_config = generation
        self.generation_config.use_cache = bool(self.specs)

    def _take(self, program: Program, pieces_on: torch.device | None = None, consume: bool = False) -> None:
        """Let an emitted program be what runs."""
        self.specs = cache_specs(program if program.phases is None else program.phases.decode)
        self.graph: nn.Module
        self.decode_graph: nn.Module | None = None
        if pieces_on is None:
            self.graph, self.decode_graph = build_phases(program, consume=consume)
        else:
            self.graph = InPieces(program, pieces_on)
            if program.phases is not None:
                self.decode_graph = InPieces(program.phases.decode, pieces_on)
        self._handover = None if program.phases is None else Prefill(program)
        self._no_cache = program.notes.get(NO_CACHE)
        graphs = [one.graph for one in entries(program).values()]
        self._selects = all(any(n.op == "placeholder" and n.target == KEPT for n in graph.nodes) for graph in graphs)
        # A mask of the model's own making is as long as the tokenizer's.
        self._counts_tokens = any(n.target in _COUNTS for graph in graphs for n in graph.nodes)
        self._storages: list[Storage] = []
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        phase: Literal["prefill", "decode"] | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits ``(batch, seq, vocabulary)``, and the mean next-token loss where ``labels`` are given.

        ``attention_mask`` covers what the cache holds and the new tokens. ``logits_to_keep`` is the number of last
        tokens whose logits are wanted (0: all), or their indices. A cache is made only where ``use_cache`` is true.
        ``phase`` chooses the graph of a program with phases; None leaves it to what the call looks like.

        Raises ``TypeError`` for an argument that a graph of logits cannot honour, ``CacheError`` for a foreign cache,
        ``ValueError`` for another phase.
        """
        _refuse_others(others)
        if phase not in (None, *PHASES):
            raise ValueError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
        cache = self._cache(past_key_values, use_cache)
        kept = _kept(logits_to_keep, input_ids)
        given = {KEPT: kept} if self._selects and kept is not None else {}
        if cache is None:
            graph = self.decode_graph if phase == "decode" and self.decode_graph is not None else self.graph
            logits = graph(input_ids, position_ids, _checked_mask(attention_mask, *input_ids.shape), **given)
        else:
            logits = self._with_cache(input_ids, position_ids, attention_mask, cache, given, phase)
        if kept is not None and not given:
            logits = logits.index_select(1, kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return out.to_tuple() if as_tuple else out

    def new_cache(self, room: int = 0) -> KVCache:
        """An empty cache, for ``past_key_values``; ``room`` tokens are allocated at once. Raises ``CacheError``."""
        if not self.specs:
            raise CacheError(
                f"this graph has no cache: {self._no_cache or 'it was lowered before insert-kv-cache'}; "
                "call with use_cache=False"
            )
        return KVCache(self.specs, self.device, room, self._storages)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> KVCache | None:
        if given is None:
            return self.new_cache() if use_cache else None
        if not isinstance(given, KVCache) or given.specs != self.specs:
            raise CacheError(f"expected a cache of this model (model.new_cache()), got {type(given).__name__}")
        return given

    def _with_cache(
        self,
        ids: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        cache: KVCache,
        given: dict[str, Tensor],
        phase: str | None,
    ) -> Tensor:
        batch, seq = ids.shape
        total = cache.length + seq
        mask = _checked_mask(mask, batch, total)
        if positions is None:
            positions = _positions(mask, ids, cache.length)
        # On a GPU looking would wait for it.
        if mask is not None and mask.device.type == "cpu" and not cache.padded:
            cache.padded = not bool(mask.all())
            mask = mask if cache.padded else None
        if mask is None and self._counts_tokens:
            mask = ids.new_ones((batch, total))
        storage = cache.reserve(batch, seq)
        graph = self.graph if self.decode_graph is None else self.decode_graph
        phase = phase or ("decode" if seq == 1 and cache.length else "prefill")
        if self._handover is not None and phase == "prefill":
            logits = self._handover(self.graph, cache, ids, positions, mask, given)
        elif seq == 1 and not given and isinstance(graph, fx.GraphModule) and records(self.device):
            logits = replayed(graph, storage, ids, positions, mask, cache.length)
        else:
            logits = graph(ids, positions, mask, **cache.inputs(seq), **given)
        cache.length = total
        return logits

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *rest: Any
    ) -> None:
        """``generate``'s own cache; one that the caller gives is kept."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False or not self.specs:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise CacheError(
                f"cache_implementation={generation_config.cache_implementation!r}: an emitted model brings its own "
                "cache; leave the option out"
            )
        longest = next((size for size in reversed(rest) if type(size) is int), 0)
        cache = self.new_cache(min(longest, self._longest()))
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, tokenizer: Any = None, **kwargs: Any
    ) -> dict:
        """What ``forward`` takes at a step; ``tokenizer`` is for ``generate``'s stopping rules and goes no further.

        A text that grows beyond the length at which RoPE takes its other table is read again: keys in the cache were
        turned by the first.
        """
        cache, limit = kwargs.get("past_key_values"), _switch(self.config)
        if isinstance(cache, KVCache) and 0 < cache.length <= limit < input_ids.shape[1]:
            cache.length = 0
            kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.graph.device if isinstance(self.graph, InPieces) else super().device

    @property
    def dtype(self) -> torch.dtype:
        return self.graph.program.dtype if isinstance(self.graph, InPieces) else super().dtype

    def _longest(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 17)

    # What a module with plain weights can do, and this one cannot.

    def to(self, *args: Any, **kwargs: Any) -> EmittedCausalLM:
        """Move to a device. Raises ``TypeError`` for another dtype: a graph is lowered for one."""
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None and dtype != self.dtype:
            _refuse_dtype(self.dtype, dtype)
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> EmittedCausalLM:
        """A weight of both phases is one tensor, and stays one."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = (tensor, fn(tensor))
            return moved[id(tensor)][1]

        found: EmittedCausalLM = super()._apply(once, *args, **kwargs)
        return found

    def half(self, *args: Any) -> EmittedCausalLM:
        return self.to(torch.float16)

    def float(self, *args: Any) -> EmittedCausalLM:
        return self.to(torch.float32)

    def double(self) -> EmittedCausalLM:
        return self.to(torch.float64)

    def bfloat16(self) -> EmittedCausalLM:
        return self.to(torch.bfloat16)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ``TypeError``: the folder would open as a model with other weights."""
        raise TypeError(
            "save_pretrained would write the weights of a graph under the name of an architecture that lacks their "
            "rewrites; `mxfx run --out DIR` saves an emitted model, mxfx.load(DIR) opens it, and "
            "mxfx.export.folder.MxfxForCausalLM(program) saves itself"
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ``TypeError``, as ``save_pretrained``."""
        self.save_pretrained()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ``TypeError``: sizes are part of a graph."""
        raise TypeError("an emitted graph has a vocabulary of one size; resize the model before it is traced")

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come with the graph."""


def _switch(config: Any) -> int:
    """The last length of RoPE's first table (``longrope``); no length where there is one table."""
    given = getattr(config, "rope_parameters", None) or {}
    found = [p for p in (given, *given.values()) if isinstance(p, dict) and p.get("rope_type") == "longrope"]
    return min((int(p["original_max_position_embeddings"]) for p in found), default=-1)


def _refuse_others(others: dict[str, Any]) -> None:
    """Arguments that mean nothing here may be absent, None or False; older transformers give ``cache_position`` too."""
    for name, value in others.items():
        if value is None or value is False or name == "cache_position":
            continue
        raise TypeError(f"an emitted graph takes input_ids and gives logits; it cannot honour {name}={_said(value)}")


def _said(value: object) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _refuse_dtype(have: torch.dtype, wanted: torch.dtype) -> NoReturn:
    raise TypeError(
        f"the graph was lowered for {have}, so it cannot run in {wanted}; give the pipeline [model] dtype = "
        f'"{str(wanted).removeprefix("torch.")}", or trace the model in it'
    )


def _kept(wanted: int | Tensor, ids: Tensor) -> Tensor | None:
    """The tokens, int64 ``(kept,)``, that ``logits_to_keep`` means; None for all."""
    length = ids.shape[1]
    if isinstance(wanted, Tensor):
        tokens = torch.arange(length, device=ids.device)[wanted.to(ids.device)]
        if tokens.dim() != 1:
            raise ValueError(f"logits_to_keep is a number or the indices of tokens (kept,), not {tuple(wanted.shape)}")
        return tokens
    return torch.arange(length - wanted, length, device=ids.device) if 0 < wanted < length else None


def _checked_mask(mask: Tensor | None, batch: int, total: int) -> Tensor | None:
    if mask is None or tuple(mask.shape) == (batch, total):
        return mask
    raise ValueError(
        f"attention_mask is (batch, tokens of cache and call) = {(batch, total)}, 1 for each real token, "
        f"not {tuple(mask.shape)}"
    )


def _positions(mask: Tensor | None, ids: Tensor, past: int) -> Tensor:
    """Positions of the new tokens, int64 ``(batch, seq)``: real tokens are counted."""
    if mask is None:
        return torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
    return (mask.ne(0).cumsum(-1) - 1).clamp_min(0)[:, past:]


def configs_of(program: Program) -> tuple[PreTrainedConfig, GenerationConfig]:
    """The configuration of the source model, and how it generates by default."""
    dropped = ("transformers_version", "_attn_implementation", "loss_type", GENERATION)
    values = {key: value for key, value in program.source.config.items() if key not in dropped}
    model_type = str(values.pop("model_type"))
    config = AutoConfig.for_model(model_type, **with_floats(values))
    config.tie_word_embeddings = False
    stored = program.source.config.get(GENERATION)
    generation = (
        GenerationConfig.from_dict(dict(stored))
        if isinstance(stored, dict)
        else GenerationConfig.from_model_config(config)
    )
    return config, generation


def with_floats(value: Any) -> Any:
    """A configuration's JSON with the numbers that JSON lacks: transformers writes ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        return (
            float(value["__float__"]) if set(value) == {"__float__"} else {k: with_floats(v) for k, v in value.items()}
        )
    return [with_floats(one) for one in value] if isinstance(value, list) else value
