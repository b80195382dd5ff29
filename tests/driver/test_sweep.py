"""Every family through the shipped configurations A, GPTQ and D: ok, or refused with a reason; little stays float."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import every_name
from tests.graph.test_architectures import sampled
from tests.sweep import CONFIGS, EXCUSED, FILES, LEAST, Outcome, apart, outcome

#: Fused by heads with an attention of its own; fused rows; experts and latent attention.
FIXED = ("bloom", "phi3", "deepseek_v3")
#: How many of the computed list must go through all three: of 134 with a tiny model 125 did, over several commits.
WHOLE_AT_LEAST = 125


def told(found: Outcome) -> str:
    """What is wrong with an outcome; empty for nothing."""
    if found.kind == "CRASH" or (found.kind != "ok" and not found.why):
        return f"{found.name}: {found.kind} {found.why} {found.configs}"
    if found.kind == "ok" and set(found.configs) != set(FILES):
        return f"{found.name}: only {list(found.configs)} ran"
    if found.kind == "ok" and found.configs["A"] == "ok" and found.share < LEAST and found.name not in EXCUSED:
        return f"{found.name}: A takes {found.share:.0%} of the weights, not {found.left}"
    return ""


def test_a_family_of_which_little_gets_a_format_fails_unless_a_reason_is_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    less = tmp_path / "attention.toml"
    less.write_text((CONFIGS / FILES["A"]).read_text().replace('"attention, mlp"', '"attention"'))
    for config in set(FILES) - {"A"}:
        monkeypatch.delitem(FILES, config)
    monkeypatch.setitem(FILES, "A", str(less))
    found = outcome("llama")
    assert 0.3 < found.share < LEAST and "model.layers.1.mlp.down_proj" in told(found)
    monkeypatch.setitem(EXCUSED, "llama", "a reason")
    assert told(found) == ""


@pytest.mark.parametrize("name", FIXED)
def test_a_family_of_each_structure_goes_through_all(name: str) -> None:
    found = apart(name)
    assert found.configs == dict.fromkeys(FILES, "ok"), found
    assert found.share >= LEAST, found.left


@pytest.mark.parametrize("name", sampled(1))
def test_a_sampled_family_is_ok_or_refused_with_a_reason(name: str) -> None:
    assert told(apart(name)) == ""


#: What the families became that ran in this process: ``-k`` runs a part of them, any number of parts make the whole.
FOUND: dict[str, Outcome] = {}


@pytest.mark.thorough
@pytest.mark.parametrize("name", every_name())
def test_a_family_is_ok_or_refused_with_a_reason(name: str) -> None:
    one = FOUND[name] = apart(name)
    said = f"{one.configs or one.why} {one.left or ''}"
    print(f"\n{one.name:24} {one.kind:8} {one.share:4.0%} {one.seconds:4.0f} s {said}")
    assert told(one) == ""
    assert not (one.name in EXCUSED and one.share >= LEAST), "it needs no excuse any more"


@pytest.mark.thorough
def test_most_families_go_through_all() -> None:
    if set(FOUND) != set(every_name()):
        pytest.skip(f"{len(FOUND)} of {len(every_name())} families ran")
    assert sum(one.configs == dict.fromkeys(FILES, "ok") for one in FOUND.values()) >= WHOLE_AT_LEAST
