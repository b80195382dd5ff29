"""Mase's GPTQ formula, for comparison: written from its description, without any of mxfx's code.

What it does, and where it differs from GPTQ (arXiv 2210.17323): a block of 32 columns is rounded at once; its error
D_B moves the columns behind it by D_B diag(U_BB)⁻¹ U_BR instead of D_B U_BB⁻¹ U_BR, so errors never act inside a
block, and only the diagonal of U_BB acts outside. Columns go left to right. The shared exponent of a block is the one
of a few candidates with the smallest ‖X_B (w - q)‖², taken before rounding ("clip search on y"). All Hessians of a
decoder layer come from one pass over it with unquantized weights; then the layer runs again, quantized.

``rotate`` first puts the model in the basis of block Hadamards, so that the same formula solves the rotated problem.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 32
_DAMPING = 0.01


@torch.no_grad()
def mase_gptq(model: nn.Module, ids: Tensor, *, batch_size: int = 8, bits: int = 4, clip_search: bool = True) -> None:
    """Round all linears in the decoder layers of a Llama-like Hugging Face model in place, onto MXINT``bits``@32."""
    states, keywords = _layer_inputs(model, ids.split(batch_size))
    for layer in model.model.layers:  # type: ignore[union-attr]
        linears = _linears(layer)
        for linear, hessian in zip(linears, _hessians(layer, linears, states, keywords), strict=True):
            rounded = _round_weight(linear.weight.float(), hessian, bits, clip_search)
            linear.weight.copy_(rounded.to(linear.weight.dtype))
        states = [_run(layer, x, k) for x, k in zip(states, keywords, strict=True)]


@torch.no_grad()
def rotate(model: nn.Module, block: int = _BLOCK) -> None:
    """Change the basis of every decoder linear's input to that of a block Hadamard H; the model computes the same.

    In the output projection H is absorbed for good, through the values: W_v becomes H W_v, W_o becomes W_o H. The
    others compute (x H)(W H)ᵀ: their weight becomes W H, and a hook turns what they read.
    """
    matrix = _hadamard(block).to(next(model.parameters()).device)

    def turned(x: Tensor) -> Tensor:
        return (x.float().unflatten(-1, (-1, block)) @ matrix).flatten(-2).to(x.dtype)

    for layer in model.model.layers:  # type: ignore[union-attr]
        attention = layer.self_attn
        attention.v_proj.weight.copy_(turned(attention.v_proj.weight.mT).mT)
        for linear in _linears(layer):
            linear.weight.copy_(turned(linear.weight))
            if linear is not attention.o_proj:
                linear.register_forward_pre_hook(lambda _, args: (turned(args[0]), *args[1:]))


def _hadamard(order: int) -> Tensor:
    """Sylvester's matrix, orthonormal and symmetric; ``order`` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


class _Stop(Exception):
    pass


def _layer_inputs(model: nn.Module, batches: tuple[Tensor, ...]) -> tuple[list[Tensor], list[dict]]:
    states: list[Tensor] = []
    keywords: list[dict] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        keywords.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)  # type: ignore[union-attr, index]
    for batch in batches:
        try:
            model(batch.to(next(model.parameters()).device), use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return states, keywords


def _run(layer: nn.Module, x: Tensor, keywords: dict) -> Tensor:
    y = layer(x, **keywords)
    return y[0] if isinstance(y, tuple) else y


def _hessians(layer: nn.Module, linears: list[nn.Linear], states: list[Tensor], keywords: list[dict]) -> list[Tensor]:
    sums: dict[nn.Module, Tensor | float] = dict.fromkeys(linears, 0.0)

    def add(module: nn.Module, args: tuple, output: object) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        sums[module] = sums[module] + x.T @ x

    handles = [linear.register_forward_hook(add) for linear in linears]
    for x, k in zip(states, keywords, strict=True):
        _run(layer, x, k)
    for handle in handles:
        handle.remove()
    return [sums[linear] for linear in linears]  # type: ignore[misc]


def _round_weight(weight: Tensor, hessian: Tensor, bits: int, clip_search: bool) -> Tensor:
    weight, result = weight.clone(), torch.empty_like(weight)
    damped = hessian + _DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    for start in range(0, weight.shape[1], _BLOCK):
        cut = slice(start, start + _BLOCK)
        result[:, cut] = _round_block(weight[:, cut], hessian[cut, cut], bits, clip_search)
        error = (weight[:, cut] - result[:, cut]) / upper.diagonal()[cut]
        weight[:, cut.stop :] -= error @ upper[cut, cut.stop :]
    return result


def _round_block(block: Tensor, gram: Tensor, bits: int, clip_search: bool) -> Tensor:
    """Round rows of 32 with one exponent each: floor's, or the best of it and its two neighbours below."""
    largest = block.abs().amax(1, keepdim=True).clamp_min(2.0**-100)
    exponent = torch.frexp(largest).exponent - 1
    best, least = block, None
    for shift in (0, -1, -2) if clip_search else (0,):
        step = torch.ldexp(torch.ones_like(largest), exponent + shift - bits + 2)
        rounded = (block / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        difference = block - rounded
        loss = ((difference @ gram) * difference).sum(1, keepdim=True)
        better = torch.ones_like(loss, dtype=torch.bool) if least is None else loss < least
        best = torch.where(better, rounded, best)
        least = loss if least is None else torch.where(better, loss, least)
    return best
