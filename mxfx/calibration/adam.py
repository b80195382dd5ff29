"""Adam with a rate for each parameter, a launch a step on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mxfx.ground import ranks

#: Norm that gradients of all parameters together are clipped to.
NORM = 1.0
#: What Adam keeps of each element.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Update:
    """A step of Adam (arXiv 1412.6980), along clipped gradients unless ``clip`` is false, with a rate a parameter.

    On CUDA the second call records one graph of kernels and later ones replay it: of hundreds of parameters with rates
    of their own, the host would take longer to launch the updates than the device for a whole gradient.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rates: Sequence[float], device: torch.device, *, clip: bool = True
    ) -> None:
        self._parameters = parameters
        self._clip = clip
        self._rates = list(rates)
        self._on_gpu = device.type == "cuda"
        self._called = 0
        self._recorded: torch.cuda.CUDAGraph | None = None
        given: Sequence[float | Tensor] = self._rates
        if self._on_gpu:
            self._full = torch.tensor(self._rates, dtype=torch.float32, device=device)
            self._now = self._full.clone()
            given = list(self._now.unbind())
        groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, given, strict=True)]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True, capturable=self._on_gpu)

    def moments(self) -> list[list[Tensor]]:
        """First and second moments of every parameter; zero where it never had a gradient."""

        def moment(p: Tensor, name: str) -> Tensor:
            return self.state[p][name] if name in self.state[p] else torch.zeros_like(p)

        return [[moment(p, name) for p in self._parameters] for name in MOMENTS]

    def resume(self, step: int, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Go on behind ``step`` steps from moments of every parameter."""
        for parameter, *moments in zip(self._parameters, first, second, strict=True):
            self.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device)}
            self.state[parameter] |= {
                name: moment.to(parameter.device) for name, moment in zip(MOMENTS, moments, strict=True)
            }

    @property
    def state(self) -> dict:
        """Adam's, by parameter."""
        return self._optimizer.state

    def __call__(self, share: float) -> None:
        """Update by ``share`` of each rate, from the gradients that stand in the parameters' ``grad``."""
        if self._on_gpu:
            torch.mul(self._full, share, out=self._now)
        else:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * share
        self._called += 1
        if not self._on_gpu or self._called == 1:
            with warnings.catch_warnings():
                # The first step makes Adam's state, which a recording cannot; torch asks why it is not recorded.
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                self._step()
            return
        if self._recorded is None:
            torch.cuda.synchronize()
            self._recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._recorded, capture_error_mode=ranks.recording()):
                self._step()
        self._recorded.replay()

    def _step(self) -> None:
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, NORM)
        self._optimizer.step()
