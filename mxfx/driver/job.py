"""One job: a model's program, its tokenizer, calibration tokens and probe; the maker of every ``Context``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxfx.calibration.datasets import DatasetError, TokenSet
from mxfx.calibration.estimate import host_bytes
from mxfx.calibration.sources import SELF, calibration_tokens
from mxfx.config.pipeline import CalibrationConfig, Pipeline
from mxfx.driver.fitting import REWRITTEN, fits_rewritten
from mxfx.driver.pretrained import check_fits, load_checked, load_tokenizer, refuse_offloaded
from mxfx.driver.texts import FloatTexts
from mxfx.graph.program import Program
from mxfx.graph.prove import Proof, prove_if_possible
from mxfx.graph.trace import bind, trace
from mxfx.ground import ranks
from mxfx.ground.errors import reason_of
from mxfx.ground.files import cache_home, say_not_kept
from mxfx.ground.progress import track
from mxfx.pipeline.instruments import Dump, Ledger, Numbers, Reproduce, Timing, Verify
from mxfx.pipeline.manager import Instrument, PassManager, PipelineResult
from mxfx.pipeline.probe import Probe, vocabulary
from mxfx.rewrite import Context

#: Of the host's free memory, what a model and its rewritten weights may take.
_SHARE_OF_HOST = 0.5
#: Real text as probe, where the pipeline names some: what a model does with random ids says little of its loss.
_PROBE_SHAPE = (2, 64)


@dataclass
class Job:
    """A model on a device, and what all runs over it share.

    ``program`` is the float reference: traced, with weights, no pass run. ``given`` are calibration ids that the
    caller brings (None: a tokenizer reads the data set that a pipeline names; it is ``late_tokenizer()`` where there is
    none yet, and only data sets that are no tokens ask for it). ``warnings`` are about the model itself;
    ``texts`` are what it writes; ``progress`` shows long steps.
    """

    program: Program
    device: torch.device
    tokenizer: Any = None
    late_tokenizer: Callable[[], Any] | None = None
    given: Callable[[], Tensor] | None = None
    warnings: tuple[str, ...] = ()
    texts: FloatTexts | None = None
    progress: Callable[..., Iterator] = track
    _token_sets: dict[CalibrationConfig, TokenSet] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, pipeline: Pipeline, meta: Program, device: torch.device | str, *, trust_remote_code: bool = False
    ) -> Job:
        """The job of a pipeline's model, whose structure ``meta`` is: tokens first, for they are quicker to be wrong.

        Raises ``ModelError``, ``DatasetError``.
        """
        job = cls.without_weights(pipeline, meta, device, trust_remote_code=trust_remote_code)
        job.read_weights(pipeline, trust_remote_code=trust_remote_code)
        return job

    @classmethod
    def without_weights(
        cls, pipeline: Pipeline, meta: Program, device: torch.device | str, *, trust_remote_code: bool = False
    ) -> Job:
        """As ``load``, up to the weights: ``program`` is ``meta``, and there are no texts."""
        name, settings = pipeline.model_source(), pipeline.model
        tokenizer = load_tokenizer(name, revision=settings.revision, trust_remote_code=trust_remote_code)
        job = cls(meta, torch.device(device), tokenizer)
        if pipeline.calibration.dataset is not None and SELF not in pipeline.calibration.sources:
            job.tokens(pipeline.calibration)
        return job

    def read_weights(self, pipeline: Pipeline, *, trust_remote_code: bool = False) -> None:
        """The rest of ``load``. Raises ``ModelError``."""
        name, settings, meta = pipeline.model_source(), pipeline.model, self.program
        of_hub = {"revision": settings.revision, "trust_remote_code": trust_remote_code}
        check_fits(name, meta.weights.values(), **of_hub)
        loaded = load_checked(name, settings.dtype, **of_hub)
        fitted = fits_rewritten(meta, self.device)
        away = not fitted.whole and self.device.type != "cpu"
        self.program, proof = _bound(meta, loaded.model if away else loaded.model.to(self.device), str(name))
        notes = () if proof is None else proof.notes
        if away:
            notes += (f"weights stay on the host: to rewrite them on {self.device}, {fitted}",)
        self.warnings = (*loaded.warnings, *notes)
        self.texts = FloatTexts(loaded.model, self.tokenizer, self.device, program=lambda: self.program)

    @classmethod
    def of_model(cls, model: nn.Module, device: torch.device, given: Callable[[], Tensor] | None = None) -> Job:
        """The job of a model that is in memory. Raises ``ModelError``, ``TraceError``."""
        refuse_offloaded(model)
        return cls(trace(model), device, given=given)

    def tokens(self, calibration: CalibrationConfig) -> Tensor:
        """Calibration ids, int64 ``(samples, length)``. Raises ``DatasetError``."""
        if calibration not in self._token_sets:
            written = all(str(source).endswith(".pt") for source in calibration.sources)
            if self.tokenizer is None and self.late_tokenizer is not None and not written:
                self.tokenizer = self.late_tokenizer()
            read = partial(
                calibration_tokens,
                calibration.sources,
                self.tokenizer,
                samples=calibration.samples,
                length=calibration.length,
                seed=calibration.seed,
                shares=calibration.shares,
                repeat=calibration.repeat,
                continued=calibration.continued,
                writer=None if self.texts is None else self.texts.samples,
            )
            found = ranks.from_first(read)
            _check_tokens(found, self.program)
            self._token_sets[calibration] = found
        return self._token_sets[calibration].ids

    def data_notes(self, pipeline: Pipeline) -> tuple[str, ...]:
        """What is to be told about the calibration ids that a run of this pipeline has read."""
        found = self._token_sets.get(pipeline.calibration)
        return () if found is None else found.notes

    def _given(self) -> Tensor:
        """The ids that the caller brings, which the model must know. Raises ``DatasetError``."""
        assert self.given is not None
        ids = self.given()
        _check_tokens(TokenSet(ids, "", "the calibration tokens given"), self.program)
        return ids

    def probe(self, pipeline: Pipeline) -> Probe:
        samples, length = _PROBE_SHAPE
        seed = pipeline.calibration.seed
        if self.tokenizer is None or pipeline.calibration.dataset is None:
            return Probe(seed=seed)
        return Probe(seed=seed, ids=self.tokens(pipeline.calibration)[:samples, :length])

    def context(self, pipeline: Pipeline, *, cache: Path | None = None, strict: bool = False) -> Context:
        """What the passes of a pipeline may use beside the program."""
        made = Context(
            seed=pipeline.calibration.seed,
            device=self.device,
            cache=cache,
            strict=strict,
            progress=self.progress,
            reference=self.program,
        )
        if self.given is not None:
            made.tokens = self._given
        elif self.tokenizer is not None or self.late_tokenizer is not None:
            made.tokens = lambda: self.tokens(pipeline.calibration)
        if self.tokenizer is not None or self.late_tokenizer is not None:
            made.read = lambda dataset, samples, length: self.tokens(
                CalibrationConfig(dataset, samples, length, pipeline.calibration.seed)
            )
        return made

    def run(
        self,
        pipeline: Pipeline,
        instruments: Sequence[Instrument] = (),
        *,
        cache: Path | None = None,
        strict: bool = False,
        probe: Probe | None = None,
    ) -> PipelineResult:
        """Run a pipeline over the model. Raises what ``PassManager.run`` raises."""
        ctx = self.context(pipeline, cache=cache, strict=strict)
        size = sum(tensor.nbytes for tensor in self.program.weights.values())
        if REWRITTEN * size > _SHARE_OF_HOST * host_bytes():
            # Without a run's folder in the user's: where systems keep what is temporary may be memory.
            folder = (cache or cache_home()) / "weights"
            try:
                self.program.weights.keep_in_files(folder)
            except OSError as error:
                say_not_kept(folder, reason_of(error), "weights that passes rewrite are held in memory")
        return PassManager(instruments).run(self.program, pipeline, ctx, probe=probe or self.probe(pipeline))


def default_instruments(pipeline: Pipeline, ir: Path | None = None, repro: Path | None = None) -> list[Instrument]:
    """What stands around the passes of every run; dumps and reproducers need a folder to go to."""
    kept: list[Instrument] = [] if ir is None else [Dump(ir)]
    kept += [] if repro is None else [Reproduce(repro)]
    return [*kept, Ledger(pipeline.budget), Numbers(), Verify(), Timing()]


def _bound(meta: Program, model: nn.Module, name: str) -> tuple[Program, Proof | None]:
    """The meta program with a model's weights, and its proof; one whose checkpoint ties other weights than its
    configuration says is traced itself.
    """
    refuse_offloaded(model)
    as_stated = _tied(meta) == _tied_in(model, meta)
    program = bind(meta, model) if as_stated else trace(model, name=name, proven=False)
    return program, prove_if_possible(program, model)


def _tied(program: Program) -> set[frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for alias, home in program.weights.aliases.items():
        groups.setdefault(home, {home}).add(alias)
    return {frozenset(group) for group in groups.values()}


def _tied_in(model: nn.Module, program: Program) -> set[frozenset[str]]:
    """Groups of names of the program's weights that are one tensor in the model."""
    names = {*program.weights, *program.weights.aliases}
    groups: dict[int, set[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name in names:
            groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def _check_tokens(found: TokenSet, program: Program) -> None:
    largest, known = int(found.ids.max()), vocabulary(program)
    if largest >= known:
        raise DatasetError(
            f"{found.source}: the tokenizer gives id {largest}, the model embeds ids below {known}: "
            "they do not belong together; expected the tokenizer that the model was trained with"
        )
    longest = next((symbol.high for symbol in program.symbols if symbol.name == "seq"), None)
    if longest is not None and found.ids.shape[1] > longest:
        raise DatasetError(
            f"{found.source}: samples of {found.ids.shape[1]} tokens, the model takes at most {longest} "
            "(max_position_embeddings): lower calibration.length"
        )
