"""Is a program the model that it was traced from? Both run on a few tokens, and their logits are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, fx, nn

from mxfx.graph.errors import TraceError
from mxfx.graph.execute import execute
from mxfx.graph.node import operands, path_of
from mxfx.graph.program import Program

#: Largest relative error of the logits: op for op the same arithmetic, which batched products may sum in another order.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_SHORT, _LONG = 5, 21
#: Longest row that is tried on a device of each type: a forward pass of it must stay short.
_LIMITS = {"cpu": 1024}
_LIMIT = 16384


class UnfaithfulTrace(TraceError):
    """The program computes something else than the model; the message names the first module that differs."""


@dataclass(frozen=True)
class Proof:
    """What was compared: the largest relative error of logits, and what could not be tried."""

    error: float
    lengths: tuple[int, ...]
    notes: tuple[str, ...] = ()


def prove(program: Program, model: nn.Module, limit: int | None = None) -> Proof:
    """Compare a fresh program with its model, in the model's dtype and on its device.

    Two forward passes of two rows each: a short one without padding, and a long one of which one row is padded, long
    enough to leave the largest window or chunk behind. ``limit`` is the longest row that is tried.

    Raises ``UnfaithfulTrace``, and ``TraceError`` if the model itself fails.
    """
    device = next(model.parameters()).device
    limit = _LIMITS.get(device.type, _LIMIT) if limit is None else limit
    longest = min(limit, next((s.high for s in program.symbols if s.name == "seq"), limit))
    spans = sorted(_spans(program, model))
    beyond = [span for span in spans if span + 3 <= longest]
    notes = [
        f"what lies beyond {span} tokens (a window, a chunk, or RoPE's first length) was not tried"
        for span in spans
        if span + 3 > longest
    ]
    lengths = (min(_SHORT, longest), min(max([_LONG, *(span + 3 for span in beyond)]), longest))
    worst = 0.0
    for length, padding in zip(lengths, (0, 3), strict=True):
        ids, mask = _tokens(program, length, padding)
        error, lost = _compare(program, model, ids.to(device), mask.to(device) if padding else None)
        worst = max(worst, error)
        if lost:
            dtype = str(program.dtype).removeprefix("torch.")
            notes.append(f"padding was not tried: in {dtype} the model's own logits of a padded row are not finite")
    return Proof(worst, lengths, tuple(notes))


def _spans(program: Program, model: nn.Module) -> set[int]:
    """Windows and chunks that the program's attention has, or that the configuration names, and where RoPE changes."""
    found = {operands(n)[name] for n in program.nodes("attention") for name in ("window", "chunk")}
    compared = [user for length in program.nodes("length") for user in length.users if len(user.args) > 1]
    found |= {user.args[1] for user in compared}
    config = model.config.get_text_config()
    found |= {
        value
        for name, value in vars(config).items()
        if any(word in name for word in ("window", "chunk", "local_attention")) and type(value) is int
    }
    return {int(span) for span in found if type(span) is int and span > 0}


def _tokens(program: Program, length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Two rows of random ids and their mask; the first row is padded on the left."""
    vocabulary = min((n.args[0].meta["val"].shape[0] for n in program.nodes("embedding")), default=2)
    padding = min(padding, length - 1)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def _compare(program: Program, model: nn.Module, ids: Tensor, mask: Tensor | None) -> tuple[float, bool]:
    """The relative error, and whether rows were left out of it: the model's logits are not finite, the program's are.

    In float64 that is what eager attention, whose softmax is in float32, makes of a row in which all is hidden.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    expected = _reference(model, ids, mask)
    actual = execute(program, ids, None, mask)
    lost = torch.zeros_like(real[:, 0])
    if mask is not None:
        finite = [(x.isfinite().all(-1) | ~real).all(-1) for x in (actual, expected)]
        lost = finite[0] & ~finite[1] & ~mask.bool().all(-1)
    kept = real & ~lost[:, None]
    error = _relative(actual[kept], expected[kept])
    tolerance = _TOLERANCE.get(program.dtype, 5e-2)
    if error <= tolerance:
        return error, bool(lost.any())
    where = _first_difference(program, model, ids, mask, tolerance)
    rows = "padded" if mask is not None else "unpadded"
    raise UnfaithfulTrace(
        f"the traced program is not {type(model).__name__}: on {rows} rows of {ids.shape[1]} tokens its logits differ "
        f"by {error:.2g} of their norm, at most {tolerance:.0e} was expected; {where}. "
        "mxfx reads something of this architecture wrongly: please report it"
    )


def _relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite if either is not finite where the other is."""
    actual, expected = actual.float(), expected.float()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    difference = torch.nan_to_num(actual - expected).norm()
    return float(difference / torch.nan_to_num(expected).norm().clamp_min(1e-30))


def _reference(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The model's own logits, with positions counted from the mask, as ``generate`` does."""
    mask = torch.ones_like(ids) if mask is None else mask
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "use_cache": False,
    }
    forward = signature(model.forward)
    if not any(p.kind is p.VAR_KEYWORD for p in forward.parameters.values()):
        given = {name: value for name, value in given.items() if name in forward.parameters}
    elif "position_ids" not in forward.parameters:
        del given["position_ids"]
    with _in_eval_mode(model), _ropes_kept(model), torch.no_grad():
        try:
            logits: Tensor = model(**given).logits
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} itself fails on {ids.shape[1]} tokens, so nothing can be proved: {error}"
            ) from error
    return logits


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _ropes_kept(model: nn.Module) -> Iterator[None]:
    """A rotary embedding that remembers the longest text forgets what it sees here."""
    ropes = [module for module in model.modules() if hasattr(module, "rope_type")]
    kept = [
        (module, dict(vars(module)), dict(module.named_buffers(recurse=False)), copy.deepcopy(module._buffers))
        for module in ropes
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, values in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for name, buffer in buffers.items():
                module._buffers[name] = buffer.copy_(values[name])


def _first_difference(program: Program, model: nn.Module, ids: Tensor, mask: Tensor | None, tolerance: float) -> str:
    """The first module, in the order in which the model finishes them, whose output the program does not have."""
    outputs = _module_outputs(model, ids, mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    errors: dict[str, float] = {}

    def observe(node: fx.Node, value: object) -> object:
        path = path_of(node) if isinstance(value, Tensor) and value.is_floating_point() else ""
        while path:
            expected = outputs.get(path)
            if expected is not None and expected.shape == value.shape:
                rows = real if expected.shape[:2] == ids.shape else ...
                # One of several values that are made in a module is its output.
                error = _relative(value[rows], expected[rows])
                errors[path] = min(errors.get(path, error), error)
            path = path.rpartition(".")[0]
        return value

    execute(program, ids, None, mask, observe=observe)
    different = [path for path in outputs if errors.get(path, 0.0) > tolerance]
    if different:
        return f"the first module whose output differs is {different[0]}"
    return f"none of the {len(errors)} modules that were compared differs: it is between them"


def _module_outputs(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Mapping[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, given: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                outputs[path] = first.detach()

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules() if path]
    try:
        _reference(model, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def prove_if_possible(program: Program, model: nn.Module, limit: int | None = None) -> Proof | None:
    """``prove``, where the model has data and lies on one device; else None."""
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or torch.device("meta") in devices:
        return None
    return prove(program, model, limit)
