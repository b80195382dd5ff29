"""The loop of a distillation: batches, schedule, the best state by held-out divergence, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mxfx.calibration.adam import Update
from mxfx.calibration.sharded import ShardedUpdate
from mxfx.calibration.training import GradientStep
from mxfx.graph.tensor_file import read_tensors, write_tensors
from mxfx.ground import ranks
from mxfx.rewrite import Context

#: Of each parameter, what a checkpoint has; that of a run that averages also "average", that of one that ended "best".
_STATE = ("now", "first", "second", "best")


@dataclass(frozen=True)
class Plan:
    """How parameters are tuned.

    ``steps`` of ``batch_size`` samples, each step in ``accumulate`` parts or more whose gradients are summed (see
    ``part``); ``learning_rate`` in units of each parameter's root mean square, with a warm-up over a twentieth of the
    steps and a cosine to zero.
    After every ``check_every``-th step the held-out loss decides whether this state is the best so far; after every
    ``checkpoint_every``-th the state is written. With ``average`` the mean of the states after the last so many steps,
    older ones fading (``MovingAverage``), stands beside each state as another candidate.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulate: int = 1
    check_every: int = 0
    checkpoint_every: int = 0
    average: int = 0

    def part(self, count: int) -> int:
        """How many of ``count`` samples this process runs together in a step. All parts have one size, as a recorded
        step needs; so there may be more than ``accumulate``.
        """
        batch = range(min(self.batch_size, count))
        mine = len(batch[ranks.share(len(batch))])
        return next(mine // parts for parts in range(min(self.accumulate, mine), mine + 1) if not mine % parts)


@dataclass
class History:
    """Held-out losses by the number of steps done, of states and of their moving averages, and the best of them all."""

    held_out: dict[int, float] = field(default_factory=dict)
    averaged: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    best_is_average: bool = False

    @property
    def best(self) -> float:
        return (self.averaged if self.best_is_average else self.held_out)[self.best_step]


class MovingAverage:
    """Means of parameters over their last states: of all states at first, from ``reach`` on each older one weighs
    ``1 - 1 / reach`` of the next (arXiv 1412.6980, §7.2, without its bias). On the parameters' device, in their dtype.

    Not part of ``Update``'s recorded graph: of all parameters together it is a few launches, and its weight changes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reach: int) -> None:
        self._parameters = list(parameters)
        self._reach = reach
        self.means = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the state after ``step`` steps, of which the first is 1."""
        torch._foreach_lerp_(self.means, self._parameters, 1 / min(step, self._reach))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The means stand in the parameters until the block ends, the parameters in the means."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Contents, not tensors: recorded graphs read and write these places.
        for parameter, mean in zip(self._parameters, self.means, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)


class Distillation:
    """Tunes ``parameters`` so that ``loss`` of a batch falls; ``take`` gives its operands for chosen ones of
    ``count`` samples.

    ``check`` gives the held-out loss of the parameters as they are. Samples are drawn without one coming twice before
    all have come once. With a ``file`` the state is kept there and found again: a run that was killed ends, on a CPU,
    with the bytes of one that was not. Of several ranks each computes gradients of its samples of a batch, and updates
    its part of the parameters (``ShardedUpdate``).
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[..., Tensor],
        check: Callable[[], float],
        take: Callable[[Tensor], tuple[Tensor, ...]],
        count: int,
        ctx: Context,
        *,
        purpose: str = "distill",
        file: Path | None = None,
    ) -> None:
        if min(plan.batch_size, count) < ranks.world():
            raise ValueError(
                f"batches of {min(plan.batch_size, count)} samples are too small for {ranks.world()} processes: "
                "expected a sample for each"
            )
        self.history = History()
        self._plan = plan
        self._parameters = dict(parameters)
        self._check = check
        self._take = take
        self._count = count
        self._ctx = ctx
        self._purpose = purpose
        self._file = file
        self._step = GradientStep(loss, list(self._parameters.values()), ctx.device)
        self._best: dict[str, Tensor] = {}
        # A step of Adam moves every weight about alike; only against a weight's own scale does that mean the same.
        rates = [plan.learning_rate * float(p.detach().square().mean().sqrt()) for p in self._parameters.values()]
        self._update = (Update if ranks.world() == 1 else ShardedUpdate)(
            list(self._parameters.values()), rates, ctx.device
        )
        self._saves = ranks.from_first(lambda: file is not None)
        self._average = MovingAverage(list(self._parameters.values()), plan.average) if plan.average else None

    def run(self) -> History:
        """Tune, and leave the best state in the parameters."""
        done = self._resume()
        if not done:
            self._judge(0)
        batches = self._batches()
        remaining = range(done, self._plan.steps)
        for step in self._ctx.progress(remaining, self._purpose, len(remaining)):
            self._one(step, batches[step])
            last = step + 1 == self._plan.steps
            if last or _due(step + 1, self._plan.check_every):
                self._judge(step + 1)
            if self._saves and (last or _due(step + 1, self._plan.checkpoint_every)):
                self._save(step + 1)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])
        return self.history

    def _batches(self) -> Sequence[Tensor]:
        size, count = min(self._plan.batch_size, self._count), self._count
        generator = self._ctx.generator(self._purpose)
        rounds = math.ceil(self._plan.steps * size / count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
        return order[: self._plan.steps * size].split(size)

    def _one(self, step: int, batch: Tensor) -> None:
        self._gradients(batch)
        self._update(self._share(step))
        if self._average is not None:
            self._average.add(step + 1)

    def _share(self, step: int) -> float:
        """Of the learning rate, at a step."""
        warm = max(1, self._plan.steps // 20)
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / self._plan.steps)))

    def _gradients(self, batch: Tensor) -> None:
        """Gradients of a batch, of this rank's samples: where the update expects them."""
        mine = batch[ranks.share(len(batch))]
        parts = mine.split(self._plan.part(self._count))
        reached: list[nn.Parameter] = []
        sums: list[Tensor] = []
        for part in parts:
            self._step(*self._take(part))
            if isinstance(self._update, ShardedUpdate):
                self._update.add(len(part) / len(batch))
            elif len(parts) > 1:
                reached = [p for p in self._parameters.values() if p.grad is not None]
                grads = [p.grad for p in reached]
                sums = sums or [torch.zeros_like(grad) for grad in grads]
                torch._foreach_add_(sums, grads, alpha=len(part) / len(batch))
        for parameter, total in zip(reached, sums, strict=True):
            # On a GPU the gradient is a place that a recorded graph writes to: its content changes, not the tensor.
            assert parameter.grad is not None
            parameter.grad.copy_(total)

    def _judge(self, step: int) -> None:
        self._compare(step, self.history.held_out)
        if self._average is not None and step:
            with self._average.in_place():
                self._compare(step, self.history.averaged)

    def _compare(self, step: int, losses: dict[int, float]) -> None:
        """Enter the held-out loss of the parameters as they are; keep them if it is the least of all."""
        best = self.history.best if self.history.held_out else math.inf
        # One decision for all ranks.
        losses[step] = ranks.from_all(self._check())
        if step == 0 or losses[step] < best:
            self.history.best_step, self.history.best_is_average = step, losses is self.history.averaged
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    def _save(self, step: int) -> None:
        # All ranks meet here; the first has a file.
        moments = zip(self._parameters.items(), *self._update.moments(), strict=True)
        if self._file is None:
            return
        tensors = {f"best/{name}": tensor for name, tensor in self._best.items()}
        # Behind the last step nothing else is asked for: what stays takes a quarter.
        going_on = step < self._plan.steps
        for (name, parameter), first, second in moments if going_on else ():
            tensors |= {f"now/{name}": parameter.detach(), f"first/{name}": first, f"second/{name}": second}
        if self._average is not None and going_on:
            means = zip(self._parameters, self._average.means, strict=True)
            tensors |= {f"average/{name}": mean for name, mean in means}
        write_tensors(self._file, tensors, {"step": step, "history": asdict(self.history)})

    def _resume(self) -> int:
        """Steps that an earlier run did, its state taken over; 0 without one that can be read."""
        found = ranks.from_first(self._read)
        if found is None:
            return 0
        step, self.history, tensors = found
        self._best = {name: tensors[f"best/{name}"] for name in self._parameters}
        if step == self._plan.steps:
            return step
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"now/{name}"])
            moments = ([tensors[f"{part}/{name}"] for name in self._parameters] for part in ("first", "second"))
            self._update.resume(step, *moments)
            if self._average is not None:
                for name, mean in zip(self._parameters, self._average.means, strict=True):
                    mean.copy_(tensors[f"average/{name}"])
        return step

    def _read(self) -> tuple[int, History, dict[str, Tensor]] | None:
        """What an earlier run left: steps done, losses, and every tensor of the state."""
        if self._file is None or not self._file.exists():
            return None
        try:
            tensors, about = read_tensors(self._file)
            step = int(about["step"])
            past = about["history"]
            held_out, averaged = ({int(at): loss for at, loss in past[of].items()} for of in ("held_out", "averaged"))
            shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
            parts = _STATE if self._average is None else (*_STATE, "average")
            parts = parts if step < self._plan.steps else ("best",)
            if any(tensors[f"{part}/{name}"].shape != shapes[name] for name in shapes for part in parts):
                raise ValueError("a tensor of another shape")
            history = History(held_out, averaged, int(past["best_step"]), bool(past["best_is_average"]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint {self._file} cannot be read ({type(error).__name__}: {error}); remove it to begin anew"
            ) from error
        return step, history, tensors


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
