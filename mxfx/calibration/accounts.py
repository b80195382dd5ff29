"""What is told about weights that calibration rounded: losses, what each expert got, and what was rounded otherwise."""

from __future__ import annotations

from torch import fx

from mxfx.algorithms.gptq import GptqResult
from mxfx.algorithms.gptq_experts import ExpertResult
from mxfx.graph.node import path_of


def linear_account(node: fx.Node, weight: str, result: GptqResult, tokens: int) -> dict[str, object]:
    """What is told about one linear; losses are mean squared output errors, summed over output channels."""
    return {
        "path": path_of(node),
        "weight": weight,
        "loss": result.loss / tokens,
        "rtn_loss": result.rtn_loss / tokens,
        "damping": result.damping_used,
        "fell_back": result.fell_back,
        "dead_columns": result.dead_columns,
        "rtn_rows": result.rtn_rows,
    }


def expert_account(
    node: fx.Node, weight: str, solved: list[ExpertResult], hits: tuple[int, ...], fewest: int
) -> dict[str, object]:
    """What is told about the weights of all experts of a layer: one account, and how many tokens each expert got.

    ``starved`` names the experts under the minimum, with their tokens.
    """
    results = [one.solved for one in solved]
    rows = max(1, sum(hits))
    coverage = {
        "experts": len(hits),
        "fewest_tokens": min(hits),
        "median_tokens": sorted(hits)[len(hits) // 2],
        "most_tokens": max(hits),
        **{f"{basis}_hessian": sum(one.basis == basis for one in solved) for basis in ("own", "shared")},
        "rounded_to_nearest": sum(one.basis == "nearest" for one in solved),
        "starved": {str(expert): count for expert, count in enumerate(hits) if count < fewest},
    }
    return {
        "path": path_of(node),
        "weight": weight,
        "loss": sum(result.loss for result in results) / rows,
        "rtn_loss": sum(result.rtn_loss for result in results) / rows,
        "damping": max(result.damping_used for result in results),
        "fell_back": coverage["rounded_to_nearest"],
        "dead_columns": sum(result.dead_columns for result in results),
        "rtn_rows": sum(result.rtn_rows for result in results),
        "experts": coverage,
    }


def fallback(node: fx.Node, account: dict[str, object]) -> str | None:
    """In words, what was rounded otherwise than asked, and what helps; None if nothing was."""
    coverage = account.get("experts")
    if isinstance(coverage, dict):
        if coverage["own_hessian"] == coverage["experts"]:
            return None
        return (
            f"{path_of(node)}: {len(coverage['starved'])} of {coverage['experts']} experts got too few calibration "
            f"tokens (the least {coverage['fewest_tokens']}): {coverage['shared_hessian']} took the Hessian of all "
            f"tokens, {coverage['rounded_to_nearest']} were rounded to nearest. Give more calibration data or lower "
            "min_expert_tokens"
        )
    if not account["fell_back"]:
        return None
    if account["rtn_loss"] == 0 and account["dead_columns"]:
        return (
            f"{path_of(node)}: calibration gave it inputs of zeros alone; rounded to nearest instead. Give other "
            "calibration data, or look at what is before it"
        )
    return (
        f"{path_of(node)}: its Hessian cannot be factorized even with damping {account['damping']}; "
        "rounded to nearest instead. Give more calibration data or raise damp"
    )
