"""One folder a pass: the graph where it changed, the edited regions, matches, numbers; and an index to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mxfx.graph.diff import diff
from mxfx.graph.program import Program
from mxfx.graph.text import Printer, Printout
from mxfx.ground.files import write_json, write_text
from mxfx.pipeline.manager import Instrument, Run, Step


@dataclass
class Dump(Instrument):
    """Write ``folder/000_trace``, ``folder/001_raise-norm`` … and ``folder/index.md``. Stands first: it sees all
    findings.

    ``graph.txt`` and ``diff.txt`` are there only for passes that changed the program.
    """

    folder: Path
    _rows: list[str] = field(default_factory=list, repr=False)
    _printed: tuple[Program, Printout] | None = field(default=None, repr=False)
    _printer: Printer = field(default_factory=Printer, repr=False)

    def enter(self, run: Run) -> None:
        self._rows.clear()
        printed = self._print(run.source)
        write_text(self.folder / "000_trace" / "graph.txt", str(printed), flush=False)
        self._index(f"| 0 | [trace](000_trace/graph.txt) | {len(printed.graph)} nodes | | | |")

    def exit(self, run: Run) -> None:
        self._printed, self._printer = None, Printer()

    def _print(self, program: Program) -> Printout:
        """The program after one pass is the program before the next: it is printed once."""
        if self._printed is None or self._printed[0] is not program:
            self._printed = (program, self._printer.print(program))
        return self._printed[1]

    def after(self, step: Step) -> None:
        self._dump(step, "")

    def failed(self, step: Step, error: Exception) -> None:
        self._dump(step, f"failed: {error}".splitlines()[0].replace("|", "\\|"))

    def _dump(self, step: Step, note: str) -> None:
        name = f"{step.index:03d}_{step.pass_.name}"
        folder = self.folder / name
        links = []
        if step.record is not None:
            write_json(folder / "matches.json", step.record.to_json(), indent=1, flush=False)
            links.append(f"[matches]({name}/matches.json)")
        if step.changed and step.after is not None:
            before, after = self._print(step.before), self._print(step.after)
            write_text(folder / "graph.txt", str(after), flush=False)
            write_text(folder / "diff.txt", diff(before, after), flush=False)
            links += [f"[graph]({name}/graph.txt)", f"[diff]({name}/diff.txt)"]
        if step.findings:
            write_json(folder / "numerics.json", step.findings, indent=1, flush=False)
            links.append(f"[numbers]({name}/numerics.json)")
        self._index(_row(step, links, note))

    def _index(self, row: str) -> None:
        self._rows.append(row)
        head = "| # | pass | matched | seconds | numbers | files |\n|---|---|---|---|---|---|\n"
        write_text(self.folder / "index.md", head + "\n".join(self._rows) + "\n", flush=False)


def _row(step: Step, links: list[str], note: str) -> str:
    record = step.record
    matched = f"{len(record.matches)}, {len(record.skips)} skipped" if record is not None else ""
    timing = step.findings.get("timing")
    seconds = f"{timing['seconds']:.3f}" if isinstance(timing, dict) else ""
    called = f"{step.pass_.name} ({step.phase})" if step.phase else step.pass_.name
    return f"| {step.index} | {called} | {matched} | {seconds} | {note or _numbers(step)} | {' '.join(links)} |"


def _numbers(step: Step) -> str:
    ledger, checked = step.findings.get("ledger"), step.findings.get("numerics")
    if isinstance(ledger, dict) and "kl" in ledger:
        return f"KL {ledger['kl']:.3g} nats"
    if not isinstance(checked, dict):
        return ""
    return checked["promise"] + (f", error {checked['error']:.2g}" if "error" in checked else "")
