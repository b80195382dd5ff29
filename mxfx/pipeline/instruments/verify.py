"""The verifier after every pass: the whole graph at the start, then what a pass touched."""

from __future__ import annotations

from mxfx.graph.fake import FakeRunner, fake_mode_of
from mxfx.graph.verify import VerifyError, verify
from mxfx.pipeline.manager import Instrument, Run, Step


class Verify(Instrument):
    """Raises ``VerifyError`` with the pass's name if a pass leaves a program that is not sound."""

    _runner: FakeRunner | None = None

    def enter(self, run: Run) -> None:
        mode = fake_mode_of(run.source.graph)
        self._runner = None if mode is None else FakeRunner(mode)
        verify(run.source, runner=self._runner)

    def after(self, step: Step) -> None:
        assert step.after is not None and step.record is not None
        try:
            checked = verify(step.after, touched=step.record.touched, runner=self._runner)
        except VerifyError as error:
            raise VerifyError(f"{step.title} left a broken program: {error}") from error
        step.findings["verify"] = {"nodes": checked}
