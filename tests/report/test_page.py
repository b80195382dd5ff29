"""``report.html`` as a browser sees it: one file, no errors, every table filled, on a phone and on a large screen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mxfx import cli
from mxfx.report.html import _heat_map
from mxfx.report.html import page as page_of
from tests.local_model import save_model, save_texts

PIPELINE = r"""
[model]
name = "MODEL"
dtype = "float32"

[[pass]]
name = "fuse-norm"

[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = '.*_proj'
  weight = "mxint4@32"
  input  = "mxint4@32"
  [[pass.rule]]
  match  = '.*self_attn'
  kv     = "mxint4@16"

[[pass]]
name = "round-weights"

[[pass]]
name = "insert-fake-quant"

[[pass]]
name = "quantize-kv-cache"
"""
#: Sizes in CSS pixels and the color scheme asked for.
SCREENS = {"phone-dark": (390, 844, "dark"), "desk-light": (1440, 900, "light"), "4k-light": (3840, 2160, "light")}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ``mxfx run`` of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    file = folder / "w4a4.toml"
    file.write_text(PIPELINE.replace("MODEL", str(save_model(folder / "llama"))))
    texts, out = save_texts(folder / "texts"), folder / "out"
    said = CliRunner().invoke(
        cli.app, ["run", str(file), "--eval", "wikitext", "--eval-data", str(texts), "--out", str(out)]
    )
    assert said.exit_code == 0, said.exception
    return out


class Page(HTMLParser):
    """Cells of each table body by the table's class, and everything that a page could fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[str]] = {}
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self._table, self._cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.fetched += [str(given[key]) for key in ("src", "href") if key in given]
        if tag == "table":
            self._table = str(given["class"])
            self.tables.setdefault(self._table, [])
        if tag == "td":
            self.tables[self._table].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[self._table][-1] += data


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Page:
    return Page((run_folder / "report.html").read_text())


def test_the_page_fetches_nothing(run_folder: Path, page: Page) -> None:
    assert [url for url in page.fetched if not url.startswith(("#", "data:"))] == []
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://", (run_folder / "report.html").read_text())


def test_every_table_is_filled(page: Page) -> None:
    seen = {"results", "domain", "worst", "pipeline", "decided", "products", "multiplied", "operands", "float-operands"}
    assert set(page.tables) == seen | {"memory", "linears"}
    # What serves a node needs no reason.
    full = {name: cells for name, cells in page.tables.items() if name not in ("decided", "linears")}
    assert [name for name, cells in full.items() if not all(cell.strip() for cell in cells)] == []


def test_a_panel_shows_how_far_a_domain_is_from_the_float_model(page: Page) -> None:
    cells = page.tables["domain"]
    rows = {row[0]: row for row in (cells[i : i + 10] for i in range(0, len(cells), 10))}
    assert rows["float"][2:] == ["–"] * 8
    mean, median, agreement = (float(rows["w4a4"][i].split()[0]) for i in (3, 4, 8))
    ratio = float(rows["w4a4"][1]) / float(rows["float"][1])
    assert float(rows["w4a4"][2].split()[0]) == pytest.approx(ratio, abs=1e-3)
    assert median > 0 and mean > 0 and 0 < agreement < 1
    assert "of tokens between" in rows["w4a4"][9]
    kl = [float(cell) for cell in page.tables["worst"][::5]]
    assert kl == sorted(kl, reverse=True) and kl[0] > mean


def test_it_says_how_each_linear_runs_and_what_the_device_holds(run_folder: Path, page: Page) -> None:
    config = json.loads((run_folder / "results.json").read_text())["configs"][1]
    cells = page.tables["linears"]
    rows = {row[0]: row for row in (cells[i : i + 6] for i in range(0, len(cells), 6))}
    assert set(rows) == {one["path"] for one in config["linears"]} and len(rows) == 8
    assert rows["lm_head"][1:4] == ["1", "float32", "–"] and rows["lm_head"][5] == "its weight has no format"
    held = [config["memory"][kind] / 1e6 for kind in ("codes", "scales", "weights", "constants")]
    assert page.tables["memory"][:4] == [f"{size:,.1f}" for size in held]


def test_it_says_what_each_pass_cost_and_where_it_was_asked_for(page: Page) -> None:
    cells = page.tables["pipeline"]
    rows = {row[1]: row for row in (cells[i : i + 9] for i in range(0, len(cells), 9))}
    assert rows["fuse-norm"][5].startswith("close, error ") and rows["raise-norm"][5] == "exact"
    assert float(rows["round-weights"][6]) > 0 and float(rows["quantize-kv-cache"][7]) > 0
    assert rows["annotate"][8] == "w4a4.toml:10"


def test_coverage_names_format_rule_and_line(page: Page) -> None:
    text = " ".join(page.tables["operands"])
    assert "model.layers.*.mlp.up_proj · linear weight 2 mxint4@32 rounded annotate rule 1 (w4a4.toml:11)" in text
    assert "lm_head 1 no weight is float; input is float" in " ".join(page.tables["products"])


def test_coverage_counts_the_weights_that_are_multiplied_by_role(page: Page) -> None:
    text = " ".join(page.tables["multiplied"])
    assert re.search(r"down_proj 2 [\d,]+ 100\.0%", text) and re.search(r"head 1 [\d,]+ 0\.0%", text)


def test_regions_can_be_opened(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    assert text.count('<details class="diff">') == len(list(run_folder.glob("*/ir/*/diff.txt"))) >= 11
    assert '<span class="cut">- %rsqrt' in text and '<span class="add">+ %rms_norm_default' in text


def test_the_heat_map_has_a_cell_for_every_layer_and_operand(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text()
    first = text[text.index('<div class="heat"') : text.index('<div class="scale"')]
    assert first.count("<i ") == 2 * len(re.findall(r"<span>(?!layer)", first)) == 2 * 9


def test_report_makes_the_same_page_again(run_folder: Path) -> None:
    before = (run_folder / "report.html").read_bytes()
    (run_folder / "report.html").unlink()
    said = CliRunner().invoke(cli.app, ["report", str(run_folder)])
    assert said.exit_code == 0 and (run_folder / "report.html").read_bytes() == before


def test_no_value_of_a_run_becomes_markup(run_folder: Path, tmp_path: Path) -> None:
    document = json.loads((run_folder / "results.json").read_text())
    config = document["configs"][1]
    config["model_note"] = config["name"] = hostile = "<script>alert('1')</script>"
    config["passes"][0]["warnings"] = [hostile]
    config["passes"][0]["reasons"] = [{"count": 1, "reason": '"><script>'}]
    (tmp_path / "results.json").write_text(json.dumps(document))
    text = page_of(tmp_path)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 5


def chromium() -> str:
    """The browser; continuous integration installs it, and without it there these tests fail."""
    found = shutil.which("chromium")
    assert found, "no chromium: .ci/run installs it (apt-get install chromium)"
    return found


def browse(file: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
    ]
    return subprocess.run(
        [chromium(), *quiet, f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.browser
@pytest.mark.parametrize("screen", SCREENS)
def test_a_browser_shows_it_without_errors(run_folder: Path, tmp_path: Path, screen: str) -> None:
    width, height, scheme = SCREENS[screen]
    # The preference of the system: 0 is dark, 1 is light.
    prefers = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    shot = Path(os.environ.get("MXFX_SCREENSHOTS", tmp_path)) / f"{screen}.png"
    said = browse(
        run_folder / "report.html", tmp_path, prefers, f"--window-size={width},{height}", f"--screenshot={shot}"
    )
    assert said.returncode == 0, said.stderr
    assert [line for line in said.stderr.splitlines() if "CONSOLE" in line] == []
    assert shot.stat().st_size > 10_000
    assert has_contrast(shot, dark=scheme == "dark")


@pytest.mark.browser
def test_a_browser_builds_every_table(run_folder: Path, tmp_path: Path, page: Page) -> None:
    shown = Page(browse(run_folder / "report.html", tmp_path, "--dump-dom").stdout)
    assert shown.tables == page.tables


def has_contrast(picture: Path, dark: bool) -> bool:
    """The corner is the page's background in the scheme asked for, and something else is drawn on it."""
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    corner = pixels[0, 0].mean()
    return bool((corner < 0.3) == dark and abs(pixels - pixels[0, 0]).max() > 0.5)


def test_a_cell_of_the_heat_map_that_is_not_finite_is_not_called_equal() -> None:
    ledger = {"kl": None, "operands": {"0/q_proj": None, "0/up_proj": "not finite"}, "layers": {"0": 20.0}}
    rows = dict(_heat_map(ledger)["rows"])
    assert [cell[2:] for cell in (rows["q_proj"][0], rows["up_proj"][0])] == [("equal", ""), ("not finite", "!")]
