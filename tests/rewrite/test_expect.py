"""``expect`` is integer arithmetic over ``layers`` and nothing else."""

from __future__ import annotations

import pytest

from mxfx.rewrite.expect import check, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4 * layers", 64),
        ("layers", 16),
        ("2*(layers - 1) + 1", 31),
        ("layers // 3", 5),
        ("layers % 5", 1),
        ("-2+layers", 14),
    ],
)
def test_arithmetic(text: str, value: int) -> None:
    check(text)
    assert evaluate(text, layers=16) == value


@pytest.mark.parametrize(
    "text",
    ["", "layers +", "4 ** layers", "heads", "1.5", "layers / 2", "True", "'a'", "layers()", "[1][0]",
     "layers.real", "1 if layers else 2", "__import__('os')", "1 << 9", "(" * 300, "0" * 9999,
     "lambda: 1", "layers\0"],
)  # fmt: skip
def test_everything_else_is_refused_by_both(text: str) -> None:
    with pytest.raises(ValueError, match="expect"):
        check(text)
    with pytest.raises(ValueError, match="expect"):
        evaluate(text, layers=16)


@pytest.mark.parametrize("text", ["layers - 17", "4 // (layers - 16)", "1 % 0"])
def test_a_value_that_is_no_count_is_refused(text: str) -> None:
    check(text)
    with pytest.raises(ValueError, match=r"negative|zero"):
        evaluate(text, layers=16)
