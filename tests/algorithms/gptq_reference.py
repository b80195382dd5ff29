"""GPTQ for MX blocks in plain float64: explicit inverse, one row and one column at a time."""

import numpy as np
import torch

from mxfx.formats import Format


def gptq_reference(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: Format, damping: float, order: list[int]
) -> torch.Tensor:
    """Rounds `(rows, cols)` in the column order given, exponents swept per block and row."""
    h = hessian.double().numpy()
    h = h + damping * h.diagonal().mean() * np.eye(len(h))
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    return torch.stack([_round_row(row.double().numpy(), upper, fmt, order) for row in weight])


def _round_row(row: np.ndarray, upper: np.ndarray, fmt: Format, order: list[int]) -> torch.Tensor:
    w = row[order].copy()
    block = fmt.block or len(w)
    q = np.zeros_like(w)
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        tail = torch.from_numpy(w[start:stop])
        exponents = [0]
        if fmt.block is not None:
            exponents = fmt.scale.candidates(tail, fmt.element, None, sweep=True).tolist()
        trials = [_round_block(w.copy(), q.copy(), upper, fmt, start, stop, e) for e in exponents]
        _, w, q = min(trials, key=lambda trial: trial[0])
    out = torch.empty(len(w), dtype=torch.float64)
    out[order] = torch.from_numpy(q)
    return out


def _round_block(
    w: np.ndarray, q: np.ndarray, upper: np.ndarray, fmt: Format, start: int, stop: int, exponent: int
) -> tuple[float, np.ndarray, np.ndarray]:
    loss = 0.0
    for j in range(start, stop):
        value = torch.tensor([w[j]], dtype=torch.float64)
        q[j] = fmt.round_to_grid(value, torch.tensor([exponent], dtype=torch.int32)).item()
        error = (w[j] - q[j]) / upper[j, j]
        w[j + 1 :] -= error * upper[j, j + 1 :]
        loss += error**2
    return loss, w, q
