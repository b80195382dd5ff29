"""Texts that a model makes itself: calibration data that need no data set, and answers to evaluate on.

A float model sampled at temperature 1 shows what it is at home in (arXiv 2305.17888, §2). From the token that starts a
text it writes documents; from the opening of a user's turn it writes whole dialogues, question included (arXiv
2406.08464, §2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mxfx.calibration.datasets import DatasetError

#: Samples that grow at once, at most.
_BATCH = {"cuda": 2048, "cpu": 64}
#: Of a GPU's memory, the part that their keys and values may take: less than a model leaves that is built there whole.
_SHARE = 8

#: Steps on a GPU between two looks at whether all rows have ended: a look waits for the device.
_LOOK_EVERY = 16

_MARK = "MXFX-CONTENT"

Progress = Callable[..., Iterator]
#: Logits ``(rows, vocabulary)`` to those that tokens are drawn by.
Warp = Callable[[Tensor], Tensor]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    length: int,
    chances: Tensor,
    *,
    stop: frozenset[int] = frozenset(),
    warp: Warp | None = None,
    progress: Progress = lambda items, *_: iter(items),
) -> Tensor:
    """Continue each prompt by ``length`` tokens drawn at temperature 1, from logits as ``warp`` makes them; int64
    ``(prompts, length)`` on CPU.

    ``chances``, float64 ``(prompts, length)`` from 0 to 1, decide which: a row's tokens hang on its own prompt and its
    own row of them, not on the rows beside it. What is left of these are the last bits of the logits, which products of
    another number of rows sum in another order.

    Prompts of different lengths are padded on the left and masked. A row that drew a token of ``stop`` repeats it to
    the end; when all have, the rest is not computed. The model keeps its keys and values between steps: an emitted one
    in a cache that is made for the whole length at once. On a GPU nothing is read back before the end, but now and then
    whether all rows have ended.
    """
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = not bool(mask.all())
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    found = torch.empty(len(prompts), length, dtype=torch.int64, device=device)
    chances = chances.to(device)
    cache = model.new_cache(width + length) if hasattr(model, "new_cache") else None
    # The last logits are enough; every emitted model knows the option.
    last = {} if cache is None else {"logits_to_keep": 1}
    seldom = _LOOK_EVERY if device.type == "cuda" else 1
    with torch.no_grad():
        for step in progress(range(length), "sampling the float model", length):
            options = {"attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])} if padded else {}
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, **options, **last)
            cache = out.past_key_values
            logits = out.logits[:, -1]
            ids = drawn(logits if warp is None else warp(logits.float()), chances[:, step])
            if len(ends):
                ids = torch.where(done[:, None], found[:, max(step - 1, 0), None], ids) if step else ids
                done |= torch.isin(ids[:, 0], ends)
            found[:, step] = ids[:, 0]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1) if padded else mask
            if len(ends) and (step + 1) % seldom == 0 and bool(done.all()):
                found[:, step:] = ids
                break
    return found.cpu()


def drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """One token for each row of ``logits`` ``(rows, vocabulary)`` by its softmax: the one in which that part of the
    row's sum is passed that ``chances``, float64 ``(rows,)``, says; int64 ``(rows, 1)``. Nothing waits for a device.
    """
    sums = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    passed = sums[:, -1:] * chances[:, None]
    return torch.searchsorted(sums, passed, right=True).clamp_max_(sums.shape[-1] - 1)


def chances(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """What ``sample`` draws so many rows by, of a generator on the CPU: the same for a row however they are cut."""
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


def _positions(mask: Tensor, count: int) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)[:, -count:]


def self_samples(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    openings: Tensor | None = None,
    batch_size: int | None = None,
    progress: Progress = lambda items, *_: iter(items),
) -> Tensor:
    """``samples`` sequences of ``length`` tokens that the model wrote, int64 on CPU; those of the two kinds alternate.

    Half begin with the token that starts a text; half, where the tokenizer has a chat template, with the opening of a
    user's turn. An end of text does not end a sample: the model goes on with the next one. With ``openings``, int64
    ``(samples, opening)``, each sample begins with its own instead.

    A sample is decided by model, ``seed``, ``length`` and its own number: ``batch_size``, and whether a device takes
    kinds together, only cut the work (but see ``sample`` for the last bits). So that these are the same too, in every
    run and on every device of one kind, what grows at once without a ``batch_size`` follows from model, length and the
    size of the device, never from what is free there.
    """
    if openings is not None:
        starts = openings.tolist()
    else:
        starts = [[start_token(tokenizer)]]
        turn = user_turn(tokenizer)
        starts += [turn] if turn is not None and len(turn) < length else []
    kinds = 1 if openings is not None else len(starts)
    size = batch_size or batch_of(model, length)
    drawn_by = chances(samples, length, torch.Generator().manual_seed(seed))
    result = torch.empty(samples, length, dtype=torch.int64)
    for rows in _batches(samples, kinds, size, by_kind=model.device.type == "cuda"):
        prompts = [starts[row % len(starts)] for row in rows]
        count = length - min(map(len, prompts))
        found = sample(model, prompts, count, drawn_by[rows, :count], progress=progress)
        for row, prompt, ids in zip(rows, prompts, found, strict=True):
            result[row] = torch.cat([torch.tensor(prompt), ids[: length - len(prompt)]])
    return result


def _batches(samples: int, kinds: int, size: int, *, by_kind: bool) -> list[list[int]]:
    """Samples that are written together, at most ``size``, of kinds that alternate.

    On a GPU those of one kind, in parts of one size, which share a cache and its recorded steps; on a CPU a step of few
    rows costs little less than one of many.
    """
    if not by_kind:
        return [list(range(samples)[start : start + size]) for start in range(0, samples, size)]
    found = []
    for kind in range(kinds):
        rows = range(kind, samples, kinds)
        part = -(-len(rows) // -(-max(len(rows), 1) // size))
        found += [list(rows[start : start + part]) for start in range(0, len(rows), part)] if rows else []
    return found


def batch_of(model: Any, length: int) -> int:
    """How many sequences of ``length`` tokens grow at once on the model's device: of one kind always as many."""
    most = _BATCH.get(model.device.type, _BATCH["cpu"])
    if model.device.type != "cuda":
        return most
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    size = torch.cuda.get_device_properties(model.device).total_memory
    return max(1, min(most, size // _SHARE // (token * length)))


def start_token(tokenizer: Any) -> int:
    """The special token that a text begins with: BOS, or the first other one that is no mark of a chat's turns.

    Instruction-tuned models often name a turn's mark as BOS or EOS; a token that the chat template puts anywhere but at
    the very beginning is such a mark. Raises ``DatasetError`` where there is none.
    """
    roles = ("user", "assistant", "user")
    turns = set((rendered(tokenizer, [{"role": role, "content": _MARK} for role in roles]) or [])[1:])
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, *getattr(tokenizer, "all_special_ids", ())]
    known = [token for token in special if token is not None]
    for token in known:
        if token not in turns:
            return int(token)
    if known:
        return int(known[0])
    raise DatasetError("the tokenizer has no special token that a text could begin with; 'self' cannot be sampled")


def user_turn(tokenizer: Any) -> list[int] | None:
    """Tokens of a chat up to where the user's first words would stand; None without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before, found, _ = text.partition(_MARK)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if found else None


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]], *, answer: bool = False) -> list[int] | None:
    """Tokens of a chat under the tokenizer's template, with the opening of an ``answer``; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
