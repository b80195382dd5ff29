"""Why ``torch.export`` refuses a model, in one line: the module, or the line of its source, that is at fault."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_LONGEST = 240


def refusal(error: BaseException, model: nn.Module) -> str:
    """The innermost module that was running and what the exporter said, or the guard that fixes a dynamic size."""
    frames = list(_frames(error))
    guard = _guard(frames) if "Constraints violated" in str(error) else None
    if guard is not None:
        return f"its forward pass does not hold for every batch and length: {guard}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"
    names = {id(module): name for name, module in model.named_modules() if name}
    running = [names[id(owner)] for frame in frames if id(owner := frame.f_locals.get("self")) in names]
    where = f"in {running[-1]}: {said}" if running else said
    place = _place(frames) if "data-dependent" in said else None
    if place is not None:
        return f"{where}, at {place}: what it computes hangs on a number that only the data knows"
    kind = rope_type(model, running[-1]) if running else None
    return where if kind is None else f"{where} (RoPE of type {kind!r} depends on the length of its input)"


def is_mismatch(error: BaseException | None) -> bool:
    """Whether a product found operands of two dtypes."""
    return "expected scalar type" in str(error) or "to have the same dtype" in str(error)


def rope_type(model: nn.Module, path: str) -> str | None:
    """The type of the rotary embedding that a module computes; None for another module and for the plain type."""
    found = getattr(dict(model.named_modules()).get(path), "rope_type", None)
    kinds = set(found.values()) if isinstance(found, dict) else {found}
    kinds -= {None, "default"}
    return ", ".join(sorted(map(str, kinds))) or None


def _frames(error: BaseException | None) -> Iterator[FrameType]:
    """The frames of an error and of what it was raised from, outermost first."""
    if error is None:
        return
    yield from _frames(error.__cause__ or error.__context__)
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _place(frames: list[FrameType]) -> str | None:
    """The innermost line of the model's own code, as the exporter writes one; None where none was running."""
    own = [frame for frame in frames if "modeling_" in frame.f_code.co_filename]
    if not own:
        return None
    file = "/".join(own[-1].f_code.co_filename.split("/")[-4:])
    return f"({file}:{own[-1].f_lineno} in {own[-1].f_code.co_name})"


def _guard(frames: list[FrameType]) -> str | None:
    """The last condition on a size that the trace met in the model's own code, else in an op that it called."""
    environments = [
        found
        for frame in frames
        for value in list(frame.f_locals.values())
        if isinstance(found := getattr(value, "shape_env", value), ShapeEnv)
    ]
    if not environments:
        return None
    met = [(str(guard.expr), str(guard.sloc)) for guard in environments[-1].guards]
    met = [(condition, place) for condition, place in met if "_export/" not in place and "infer_size" not in place]
    own = [pair for pair in met if "modeling_" in pair[1]]
    if not met:
        return None
    condition, place = (own or met)[-1]
    return f"{condition[:_LONGEST]} at {place}"
