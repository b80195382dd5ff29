"""A selector with a bucket for each phase: ``prefill``, ``decode``, ``decode_policy``, ``kv_cache_handoff``.

A missing ``prefill`` is float, a missing ``decode`` is as ``prefill``. ``decode_policy = "fp_only"`` leaves decode in
float whatever its bucket says. Of an attention, a stage that a bucket does not name is bypassed, and one that it names
is not, whatever ``bypass`` says of the bucket. ``kv_cache_handoff = "decode_format"`` rounds a prefill's keys and
values once to decode's format, unless its own bucket has a ``kv_cache``; ``"fp"``, the default, keeps them as the
prefill has them. So does Mase (``chop/nn/quantized/modules/phase_config.py``), but for one thing: a prefill whose
``kv_cache`` has a format reads its own keys and values in that format here, and in Mase only later calls do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mxfx.compat.table import Table
from mxfx.ground.phases import PHASES

_POLICIES = ("quantized", "fp_only")
_HANDOFFS = {"fp": "keep", "decode_format": "requantize"}
_FLOAT = {"bypass": True}


def has_buckets(table: Table) -> bool:
    """Whether a selector has formats by phase. Raises ``ConfigError`` for keys that only such a one has."""
    if any(phase in table for phase in PHASES):
        return True
    for key in ("decode_policy", "kv_cache_handoff"):
        if key in table:
            table.fail(
                key, f"{key!r} speaks of phases, and {table.what} has neither 'prefill' nor 'decode'", "a bucket"
            )
    return False


def read_buckets(table: Table, stages: Sequence[str]) -> tuple[dict[str, Table], str]:
    """A flat table for each phase, and the handoff by its name in a pipeline. Raises ``ConfigError``."""
    given = {phase: found for phase in PHASES if (found := table.table(phase)) is not None}
    policy = _choice(table, "decode_policy", "quantized", _POLICIES)
    handoff = _HANDOFFS[_choice(table, "kv_cache_handoff", "fp", tuple(_HANDOFFS))]
    name = table.take("name", str)
    table.close()
    raw: dict[str, Mapping[str, Any]] = {phase: found.raw for phase, found in given.items()}
    raw.setdefault("prefill", _FLOAT)
    raw.setdefault("decode", raw["prefill"])
    if policy == "fp_only":
        raw["decode"] = _FLOAT
    if "kv_cache" in raw["prefill"]:
        handoff = "keep"
    attention = any(stage in bucket for bucket in raw.values() for stage in stages)
    buckets = {}
    for phase in PHASES:
        at = given[phase].at if phase in given else table.at
        bucket = Table(f"{phase} of {table.what}", _flat(raw[phase], stages if attention else ()), at)
        if name is not None and "name" not in bucket and "bypass" not in bucket.raw:
            bucket.raw = {"name": name, **bucket.raw}
        buckets[phase] = bucket
    return buckets, handoff if attention else ""


def _flat(raw: Mapping[str, Any], stages: Sequence[str]) -> Mapping[str, Any]:
    """What a bucket says, as a table without phases says it."""
    named = [stage for stage in stages if stage in raw]
    if not named:
        return _FLOAT if stages or not raw else raw
    rest = {key: value for key, value in raw.items() if key != "bypass"}
    return {**{stage: _FLOAT for stage in stages if stage not in raw}, **rest}


def _choice(table: Table, key: str, default: str, choices: Sequence[str]) -> str:
    found: str = table.take(key, str, default)
    if found not in choices:
        raise (table.at / key).error(f"{key} = {found!r}", f"one of {', '.join(choices)}")
    return found
