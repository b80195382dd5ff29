"""Weights and Hessians like a real layer's: correlated inputs, channels of unlike size."""

import torch
from torch import Tensor


def correlated_layer(
    rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = 2048
) -> tuple[Tensor, Tensor]:
    """Weight `(rows, cols)` and Hessian `(cols, cols)`."""
    generator = torch.Generator().manual_seed(seed)
    x = correlated_inputs(tokens, cols, generator)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64) * cols**-0.5
    return weight.to(dtype), (x.mT @ x / tokens).to(dtype)


def correlated_inputs(tokens: int, cols: int, generator: torch.Generator) -> Tensor:
    """`(tokens, cols)` float64: a shared low-rank part, log-normal channel scales."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = max(cols // 8, 1)
    common = normal(tokens, rank) @ normal(rank, cols) / rank**0.5
    return (0.5 * normal(tokens, cols) + common) * (0.5 * normal(cols)).exp()
