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
