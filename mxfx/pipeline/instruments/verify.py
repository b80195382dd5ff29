"""The verifier after every pass: the whole graph at the start, then what a pass touched."""

from __future__ import annotations

from torch import Tensor

from mxfx.graph.verify import VerifyError, verify
from mxfx.graph.weights import version
from mxfx.pipeline.manager import Instrument, Run, Step


class Verify(Instrument):
    """Raises ``VerifyError`` with the pass's name if a pass leaves a program that is not sound, or wrote a weight of
    the program before it in place.
    """

    _written: tuple[tuple[str, Tensor, int], ...] = ()

    def enter(self, run: Run) -> None:
        verify(run.source)

    def before(self, step: Step) -> None:
        self._written = tuple((name, tensor, version(tensor)) for name, tensor in step.before.weights.items())

    def after(self, step: Step) -> None:
        assert step.after is not None and step.record is not None
        for name, tensor, written in self._written:
            if version(tensor) != written:
                raise VerifyError(
                    f"{step.title} wrote weight {name!r} in place, which the program before it and the user's model "
                    "share; give Rewriter.set_weight a new tensor"
                )
        self._written = ()
        try:
            checked = verify(step.after, touched=step.record.touched)
        except VerifyError as error:
            raise VerifyError(f"{step.title} left a broken program: {error}") from error
        step.findings["verify"] = {"nodes": checked}

    def exit(self, run: Run) -> None:
        self._written = ()
