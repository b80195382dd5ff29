"""Every decoder-only architecture that transformers offers: its graph equals the model, or is refused with a reason."""

from __future__ import annotations

import datetime
import hashlib
import inspect
from collections import Counter

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.ground.errors import MxfxError
from tests.architectures import VOCABULARY, NotCausal, Unbuilt, build, every_name, in_a_process

#: Length and padding of the rows: within and beyond windows and chunks of 8 tokens.
ROWS = ((3, 0), (19, 0), (19, 5), (40, 7))
TOLERANCE = 1e-5
#: One for each structure: Conv1D, lists as indices, sinks, latent attention, convolutions, scans, chosen keys, layers
#: scaled in place, scores hidden by a tensor of one number.
FIXED = ("gpt2", "falcon", "gpt_oss", "deepseek_v3", "lfm2", "bamba", "deepseek_v32", "gemma4_text", "gpt_neo")
#: How many of the computed list must be equal: as many as were, of 134 that are causal.
EQUAL_AT_LEAST = 126


def sampled(count: int) -> tuple[str, ...]:
    """Other names each week, the same for everybody in it."""
    week = str(datetime.date.today().isocalendar()[:2])
    others = [name for name in every_name() if name not in FIXED]
    return tuple(sorted(others, key=lambda name: hashlib.sha256(f"{week}{name}".encode()).digest())[:count])


def verdict(name: str) -> tuple[str, str]:
    """``equal``, ``refused`` or ``none`` (no causal model of that name was built), and why. ``WRONG`` is for no one."""
    try:
        model = build(name)
    except (NotCausal, Unbuilt) as error:
        return "none", f"{type(error).__name__}: {error}"
    try:
        program = trace(model)
        verify(program)
    except MxfxError as error:
        return "refused", f"{type(error).__name__}: {error}"
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    worst = 0.0
    for length, padding in ROWS:
        ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        given = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if takes_positions else {}
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[mask.bool()]
        actual = execute(program, ids, None, mask if padding else None)[mask.bool()]
        error = float((actual - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            return "WRONG", f"error {error:.1e} on rows of {length} tokens, {padding} of them padding"
        worst = max(worst, error)
    return "equal", f"{worst:.0e}"


def apart(name: str) -> tuple[str, str]:
    """``verdict`` in a process of its own, with bounds on memory and time."""
    found, crash = in_a_process(lambda: verdict(name))
    kind, why = found if found is not None else ("CRASH", crash)
    return kind, why


@pytest.mark.parametrize("name", FIXED)
def test_an_architecture_of_each_structure_is_equal_to_its_model(name: str) -> None:
    assert verdict(name)[0] == "equal", verdict(name)


@pytest.mark.parametrize("name", sampled(2))
def test_a_sampled_architecture_is_equal_or_refused_with_a_reason(name: str) -> None:
    kind, why = apart(name)
    assert kind in ("equal", "refused", "none"), why
    assert why


#: What became of those that ran in this process: ``-k`` runs a part of them, any number of parts make the whole.
FOUND: dict[str, str] = {}


@pytest.mark.thorough
@pytest.mark.parametrize("name", every_name())
def test_an_architecture_is_equal_or_refused_with_a_reason(name: str) -> None:
    kind, why = apart(name)
    FOUND[name] = kind
    print(f"\n{name:24} {kind:8} {why[:160]}")
    assert kind in ("equal", "refused", "none"), why
    assert why


@pytest.mark.thorough
def test_most_architectures_are_equal() -> None:
    if set(FOUND) != set(every_name()):
        pytest.skip(f"{len(FOUND)} of {len(every_name())} architectures ran")
    assert Counter(FOUND.values())["equal"] >= EQUAL_AT_LEAST, FOUND


def test_a_reason_is_short_and_names_the_line_at_fault() -> None:
    """A guard of torch.export runs over pages; what a user needs is the line of the model that fixes the length."""
    kind, why = verdict("recurrent_gemma")
    assert kind == "refused" and len(why) < 400
    assert "does not hold for every batch and length" in why and "modeling_recurrent_gemma.py" in why
