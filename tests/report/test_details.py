"""What passes decided, on the page: tables by shape, the rest as a list, everything escaped."""

from __future__ import annotations

from mxfx.report.details import decisions


def _step(**details: object) -> dict[str, object]:
    return {"pass": "a-search", "details": details}


def test_nothing_is_said_of_passes_that_left_nothing() -> None:
    assert decisions([_step(), {"pass": "other", "details": {}}]) == ""


def test_sites_are_rows_and_their_fields_columns() -> None:
    errors = {"wush-32": 0.0123456, "none": 0.5}
    page = decisions(
        [_step(**{"layers.0.q_proj": {"chosen": "wush-32", "errors": errors}, "layers.0.o_proj": {"chosen": "<none>"}})]
    )
    assert "<th>chosen</th><th>errors</th>" in page
    assert "<td class='path'>layers.0.q_proj</td><td>wush-32</td><td>wush-32 0.01235, none 0.5</td>" in page
    assert "<td class='path'>layers.0.o_proj</td><td>&lt;none&gt;</td><td>–</td>" in page


def test_tables_inside_details_stand_below_the_plain_values() -> None:
    page = decisions(
        [_step(winners=["q_proj", "kv_cache"], baseline=21.5, steps=[{"winner": "q_proj"}, {"winner": None}])]
    )
    assert "<li>winners: q_proj, kv_cache</li><li>baseline: 21.5</li>" in page
    assert page.index("baseline") < page.index("<p class='soft'>steps</p>")
    assert "<td class='path'>2</td><td>None</td>" in page


def test_a_curve_with_named_points_is_drawn() -> None:
    """The first point halfway along the axis of bits and, 0.1 between 1 and 0.01, halfway up."""
    chart = {"curve": [[3, 1.0], [5, 0.01]], "points": {"<chosen>": {"bits": 4, "predicted_kl": 0.1}}}
    page = decisions([_step(kl_over_bits=chart, bits=4.0)])
    assert '<polyline points="0.0,0.0 400.0,200.0 "' in page
    assert '<circle cx="200.0" cy="100.0" r="5" fill="var(--cut)"><title>&lt;chosen&gt;: 4, 0.1</title>' in page
    assert "kl over bits: 0.01 to 1 (logarithmic) over 3 to 5" in page
    assert "<li>bits: 4</li>" in page and "curve" not in page


def test_a_curve_that_reaches_nothing_and_one_of_a_single_point_are_drawn_too() -> None:
    zero = {"curve": [[3, 0.5], [5, 0.0]], "points": {"a": {"bits": 3, "kl": 0.0}}}
    alone = {"curve": [[4, 0.5]], "points": {}}
    assert "polyline" in decisions([_step(one=zero, other=alone, n=1)])


def test_values_of_a_kind_stand_side_by_side() -> None:
    shown = decisions([_step(bits_over_layers={"bars": {"layer 0": 4.25, "layer 1": 8.5}}, bits=4.0)])
    assert "bits over layers: 4.25, 8.5" in shown
    assert shown.count("<rect") == 2 and 'height="40.0"' in shown and 'height="80.0"' in shown
    assert "<title>layer 1: 8.5</title>" in shown


def test_a_pass_of_one_phase_says_which() -> None:
    page = decisions([_step(baseline=1.5) | {"phase": "decode"}, _step(baseline=1.5)])
    assert "<summary>a-search (decode)</summary>" in page and "<summary>a-search</summary>" in page
