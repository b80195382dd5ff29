"""An order of passes that cannot work is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from mxfx.config import ConfigError, Pipeline, check_order, loads
from mxfx.config.order import possible_order
from mxfx.rewrite import Fact
from tests.config.stubs import MARKED, Idle, Mark, Solve, registered

EGG, HEN = Fact("stub-egg", "there is an egg"), Fact("stub-hen", "there is a hen")


@dataclass(frozen=True)
class Egg(Idle):
    name: ClassVar[str] = "stub-egg"
    requires: ClassVar[frozenset[Fact]] = frozenset({HEN})
    provides: ClassVar[frozenset[Fact]] = frozenset({EGG})


@dataclass(frozen=True)
class Hen(Idle):
    name: ClassVar[str] = "stub-hen"
    requires: ClassVar[frozenset[Fact]] = frozenset({EGG})
    provides: ClassVar[frozenset[Fact]] = frozenset({HEN})


@dataclass(frozen=True)
class Other(Idle):
    name: ClassVar[str] = "stub-other"


@pytest.fixture(autouse=True)
def more_stubs() -> Iterator[None]:
    with registered(Egg, Hen, Other):
        yield


def test_the_facts_that_hold_at_the_end_come_back() -> None:
    assert check_order(Pipeline([Mark(), Solve()])) == {"stub-marked", "stub-rounded"}
    assert check_order(Pipeline([Solve()]), frozenset({MARKED})) == {"stub-marked", "stub-rounded"}


def test_a_pass_after_what_it_forbids_cites_its_line_and_an_order_that_works() -> None:
    text = "\n".join(f'[[pass]]\nname = "{name}"' for name in ("stub-mark", "stub-solve", "stub-mark"))
    pipeline = loads("[model]\n" + text, "p.toml")
    with pytest.raises(ConfigError) as caught:
        check_order(pipeline)
    message = str(caught.value)
    assert message.startswith("p.toml:7:8: pass 'stub-mark' must come before 'stub-rounded'")
    assert "[5] stub-solve (line 4) makes it true" in message
    assert "expected: [6] stub-mark (line 6) before stub-solve" in message
    assert message.endswith("possible: [4] stub-mark (line 2), [6] stub-mark (line 6), stub-solve")
    assert len(message.splitlines()) == 5  # what is broken, its line, what is expected, what to do: nothing that holds


def test_a_missing_fact_names_the_pass_that_provides_it() -> None:
    with pytest.raises(ConfigError, match=r"requires 'stub-marked'(.|\n)*expected: stub-mark before it"):
        check_order(Pipeline([Solve()]))


def test_passes_that_wait_for_each_other_are_shown_as_a_circle() -> None:
    with pytest.raises(
        ConfigError, match=r"go round in a circle: \[0\] stub-egg → \[1\] stub-hen → \[0\] stub-egg"
    ) as caught:
        check_order(Pipeline([Egg(), Hen(), Other()]))
    assert "\n  [0] stub-egg provides 'stub-egg', which stub-hen requires\n  [1] stub-hen provides" in str(caught.value)


def test_the_proposed_order_changes_as_little_as_possible() -> None:
    passes = (Other(), Solve(), Mark())
    assert possible_order(passes) == (0, 2, 1)


def test_a_pass_that_is_missing_is_an_error_too() -> None:
    from mxfx.config import PassSpec

    with pytest.raises(ConfigError, match="unknown pass 'not-yet'"):
        check_order(Pipeline([PassSpec("not-yet")]))
