"""A cache for structures beside plain grouped heads: latent attention, soft caps, sinks, shared layers, experts, and
for masks and biases that a model makes itself.
"""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch.ops import aten, mxfx

from mxfx.config import Pipeline, loads
from mxfx.driver.check import Checked
from mxfx.graph.program import Program
from mxfx.graph.tiny import shaken
from mxfx.graph.trace import trace
from mxfx.passes import InsertKvCache
from mxfx.passes.insert_kv_cache import without_cache
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Rewriter, apply
from mxfx.runtime.cache import CacheError
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tests.architectures import build
from tests.graph.test_masks import built
from tests.programs import config_a, padded_batch, passed, raised
from tests.runtime.feeding import steps

#: Model type → what is special about its attention.
STRUCTURES = {
    "minicpm3": "latent: keys wider than values",
    "deepseek_v3": "latent, with experts",
    "gemma2": "soft caps, every other layer under a window",
    "gpt_oss": "sinks, every other layer under a window",
    "gemma3n_text": "layers that share keys and values",
    "qwen3_moe": "experts",
    "phimoe": "a window that only the mask knows",
    "gpt2": "a mask that it reshapes",
    "ctrl": "places looked up in a table",
    "gpt_neo": "tables of what a token sees; scores hidden by a tensor of one number",
    "llama4": "chunks; temperatures by place where there is no RoPE",
    "falcon": "linear biases in the mask of its own SDPA, one key head",
}


def temperate() -> torch.nn.Module:
    """Llama 4 whose temperatures change within a short text."""
    return built(
        T.Llama4TextConfig, attention_chunk_size=8, interleave_moe_layer_step=2, intermediate_size_mlp=96,
        num_local_experts=4, num_experts_per_tok=1, floor_scale=4, attn_scale=0.5, no_rope_layers=[1, 0],
    )  # fmt: skip


def biased() -> torch.nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
    torch.manual_seed(0)
    return shaken(T.AutoModelForCausalLM.from_config(T.FalconConfig(**sizes, alibi=True))).eval()


def both(name: str) -> tuple[torch.nn.Module, EmittedCausalLM]:
    model = {"llama4": temperate, "falcon": biased}.get(name, lambda: build(name))()
    program = PassManager().run(trace(model), Pipeline([]).completed()).program
    return model, as_causal_lm(program)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=() if name in ("gemma2", "gpt2", "ctrl", "gpt_neo", "llama4", "falcon") else pytest.mark.thorough,
        )
        for name in STRUCTURES
    ],
)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, lm = both(name)
    assert lm.specs
    ids = torch.randint(3, 128, (5, 20), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(20)[None] >= 3 * torch.arange(5)[:, None]).long()
    given = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 30}
    assert torch.equal(lm.generate(ids * mask, **given), model.generate(ids * mask, **given))


def alibi(rw: Rewriter, like) -> torch.fx.Node:
    """A bias that grows with the number of real tokens, as Bloom computes it: ``(batch, heads, 1, seq)``."""
    ids, _, mask = (n for n in rw.graph.nodes if n.op == "placeholder")
    real = rw.call(mxfx.real_tokens.default, ids, mask, like=like)
    place = rw.call(aten.sub.Tensor, rw.call(aten.cumsum.default, real, -1, like=like), 1, like=like)
    size = [rw.call(aten.sym_size.int, ids, axis, like=like) for axis in (0, 1)]
    place = rw.call(aten.add.Tensor, place, rw.call(aten.new_zeros.default, ids, [], like=like), like=like)
    rows = rw.call(aten.reshape.default, place, [size[0], 1, 1, size[1]], like=like)
    slopes = rw.add_weight("slopes", 0.5 ** torch.arange(1.0, 5.0).reshape(1, 4, 1, 1), like)
    return rw.call(aten.mul.Tensor, rows, slopes, like=like)


def sparse(rw: Rewriter, like) -> torch.fx.Node:
    """A causal mask under which a token sees every third place and itself: ``(batch, 1, seq, seq)``."""
    ids, _, mask = (n for n in rw.graph.nodes if n.op == "placeholder")
    queries, keys = (rw.call(mxfx.places.default, ids, of, like=like) for of in ("queries", "keys"))
    column = rw.call(aten.unsqueeze.default, queries, 1, like=like)
    distance = rw.call(aten.sub.Tensor, column, keys, like=like)
    third = rw.call(aten.eq.Scalar, rw.call(aten.remainder.Scalar, distance, 3, like=like), 0, like=like)
    causal = rw.call(mxfx.position_mask.default, ids, mask, True, None, None, like=like)
    return rw.call(aten.logical_and.default, causal, third, like=like)


def everything(rw: Rewriter, like) -> torch.fx.Node:
    """A mask that hides nothing but padding."""
    ids, _, mask = (n for n in rw.graph.nodes if n.op == "placeholder")
    return rw.call(mxfx.position_mask.default, ids, mask, False, None, None, like=like)


def with_own(program: Program, make, operand: int, causal: bool) -> Program:
    """The program, its attention given a mask (operand 3) or a bias (operand 10) of its own making."""
    program = program.copy()
    rw = Rewriter(program, "test")
    attentions = list(program.nodes("attention"))
    value = make(rw, attentions[0])
    for node in attentions:
        rw.set_operand(node, 5, causal)
        rw.set_operand(node, operand, value)
    return program


@pytest.mark.parametrize("family", ["llama-tiny", "mistral-tiny"])
@pytest.mark.parametrize(("make", "operand", "causal"), [(alibi, 10, True), (sparse, 3, False)])
@pytest.mark.parametrize("padded", [True, False])
def test_what_a_model_makes_itself_covers_the_cache(family: str, make, operand: int, causal: bool, padded) -> None:
    ids, mask, _ = padded_batch()
    mask = mask if padded else torch.ones_like(mask)
    plain = raised(family)
    lm = as_causal_lm(with_own(plain, make, operand, causal))
    whole = lm(ids, attention_mask=mask).logits
    assert not torch.allclose(whole, as_causal_lm(plain)(ids, attention_mask=mask).logits, atol=1e-2)
    for lengths in ([12, 1], [4, 9], [1] * 13, [7, 1, 1, 4]):
        found = steps(lm, ids, mask, lengths)
        torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=1e-5, atol=1e-5)


def test_no_step_makes_a_square_of_its_room() -> None:
    """A mask of the model's own making is made for the new tokens: of what it is computed from no more is taken."""
    program = apply(InsertKvCache(), with_own(raised("llama-tiny"), sparse, 3, False)).program
    (taken,), (mask,) = (list(program.nodes(op)) for op in ("at_slots", "position_mask"))
    assert taken.args[0].meta["val"].shape[1:] == (1,)
    assert mask.args[5] is taken.args[1] and mask.args[5].target == "slots"


@pytest.mark.parametrize(("make", "operand", "causal"), [(alibi, 10, True), (sparse, 3, False)])
def test_a_packed_cache_under_an_own_mask_gives_the_bits_of_a_rounded_one(make, operand, causal, monkeypatch) -> None:
    program = with_own(passed(raised("llama-tiny"), config_a()), make, operand, causal)
    packed = as_causal_lm(program)
    monkeypatch.setattr("mxfx.passes.insert_kv_cache.stores", lambda fmt: False)
    rounded = as_causal_lm(program)
    ids, mask, _ = padded_batch()
    assert [{spec.dtype for spec in lm.specs} for lm in (packed, rounded)] == [{torch.uint8}, {torch.float32}]
    for lengths in ([12, 1], [1] * 13, [6, 3, 1, 3]):
        assert torch.equal(steps(packed, ids, mask, lengths), steps(rounded, ids, mask, lengths))


def test_an_own_mask_that_shows_later_tokens_or_reads_the_text_gets_no_cache_and_is_told_why() -> None:
    bidirectional = with_own(raised("llama-tiny"), everything, 3, False)
    with pytest.raises(CacheError, match="has no cache: attention: position_mask_default lets tokens see later ones"):
        as_causal_lm(bidirectional).new_cache()
    later = apply(InsertKvCache(), bidirectional).record
    assert "position_mask_default lets tokens see later ones" in later.skips[0].reason and not later.matches

    def by_text(rw: Rewriter, like) -> torch.fx.Node:
        ids = next(n for n in rw.graph.nodes if n.op == "placeholder")
        rows = rw.call(aten.reshape.default, ids, [-1, 1, 1, rw.call(aten.sym_size.int, ids, 1, like=like)], like=like)
        return rw.call(mxfx.cast.default, rw.call(aten.mul.Tensor, rows, 0.1, like=like), "model", like=like)

    read = apply(InsertKvCache(), with_own(raised("llama-tiny"), by_text, 10, True)).record
    assert "depends on what the tokens are, which no cache holds" in read.skips[0].reason and not read.matches


def told(program: Program) -> list[str]:
    """What ``mxfx check`` prints of a program."""
    return list(Checked(loads("pass = []"), program, program, 0.0).lines())


def test_a_causal_call_is_not_trusted_to_join_causality_to_a_ready_mask() -> None:
    """By definition nothing is joined to a ready mask: with a cache this call would compute something else."""
    trusted = with_own(raised("llama-tiny"), everything, 3, True)
    ids, _, _ = padded_batch()
    first, short = (as_causal_lm(trusted)(one).logits[:, 0] for one in (ids, ids[:, :1]))
    assert not torch.allclose(first, short, atol=1e-3), "it sees later tokens"
    found = apply(InsertKvCache(), trusted)
    assert "position_mask_default lets tokens see later ones" in found.record.skips[0].reason
    assert not found.record.matches and not as_causal_lm(trusted).specs


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (torch.finfo(torch.bfloat16).min, None),
        (-1e4, "adds -10000 to the scores of later tokens, which hides none whose score is higher by that"),
        (-10.0, "lets tokens see later ones"),
    ],
)
def test_a_mask_of_finite_numbers_gets_no_cache_unless_it_hides_whatever_the_scores_are(number, reason) -> None:
    def additive(rw: Rewriter, like) -> torch.fx.Node:
        ids, _, mask = (n for n in rw.graph.nodes if n.op == "placeholder")
        allowed = rw.call(mxfx.position_mask.default, ids, mask, True, None, None, like=like)
        added = rw.call(aten.where.Scalar, allowed, 0.0, number, like=like)
        return rw.call(mxfx.cast.default, added, "model", like=like)

    program = with_own(raised("llama-tiny"), additive, 10, False)
    record = apply(InsertKvCache(), program).record
    assert [reason in skip.reason for skip in record.skips] == ([] if reason is None else [True, True])
    assert len(record.matches) == (2 if reason is None else 0)
    said = [line for line in told(program) if line.startswith("cache of keys and values: none; ")]
    assert [str(reason) in line for line in said] == ([] if reason is None else [True])


def test_without_weights_a_table_is_not_trusted_to_hide_later_tokens() -> None:
    model = build("gpt_neo")
    with torch.device("meta"):
        empty = T.AutoModelForCausalLM.from_config(model.config)
    read, unread = (PassManager().run(trace(one), Pipeline([]).completed()).program for one in (model, empty))
    assert without_cache(read) is None
    assert not any(line.startswith("cache of keys") for line in told(read))
    (line,) = (line for line in told(unread) if line.startswith("cache of keys and values: told once weights are read"))
    assert Checked(loads("pass = []"), unread, unread, 0.0).cache_line(64, 1) == line
    assert "attn.attention.bias, whose numbers have not been read" in str(without_cache(unread))


def test_layers_without_a_window_have_no_ring() -> None:
    _, lm = both("gemma2")
    assert {spec.window for spec in lm.specs} == {8, None}
