"""Texts that a model writes itself: the right distribution, the right beginnings, the same bytes for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxfx.calibration.datasets import DatasetError, load_tokens
from mxfx.calibration.sampling import _batches, batch_of, chances, drawn, sample, self_samples, start_token, user_turn
from mxfx.calibration.sources import OPENING, calibration_tokens, split_by_share
from mxfx.driver.texts import FloatTexts
from mxfx.runtime.causal_lm import EmittedCausalLM
from tests.evaluation.chatty import byte_model, byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return byte_model()


def _chances(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return chances(rows, length, torch.Generator().manual_seed(seed))


def test_the_first_token_is_drawn_from_the_model_s_distribution(model) -> None:
    count = 20_000
    found = sample(model, [[5, 6, 7]] * count, 1, _chances(count, 1))
    share = torch.bincount(found[:, 0], minlength=259) / count
    wanted = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((share - wanted).abs() <= 5 * spread + 1e-4).all())


def test_with_its_cache_a_text_is_that_of_the_whole_prefix_each_time(model) -> None:
    by, ids = _chances(1, 24, 3), [5, 6, 7]
    for step, token in enumerate(sample(model, [[5, 6, 7]], 24, by)[0].tolist()):
        assert int(drawn(model(torch.tensor([ids])).logits[0, -1:], by[:, step])) == token
        ids.append(token)


def test_prompts_of_other_lengths_do_not_disturb_a_text(model) -> None:
    short, long = [5, 6, 7], list(range(10, 30))
    padded = sample(model, [long, short], 1, _chances(2, 1))
    ids = torch.tensor([[0] * 17 + short])
    mask = torch.tensor([[0] * 17 + [1] * 3])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = model(torch.tensor([short])).logits[0, -1]
    beside = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)
    assert padded.shape == (2, 1)


def test_a_row_that_ended_stays_at_its_end(model) -> None:
    stop = frozenset(range(0, 259, 2))
    for row in sample(model, [[5]] * 16, 12, _chances(16, 12), stop=stop).tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row) - 1)
        assert set(row[end:]) == {row[end]}


def test_tokens_are_drawn_in_their_shares_and_impossible_ones_never() -> None:
    count, shares = 50_000, torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    found = drawn(shares.log().expand(count, -1), _chances(count, 1)[:, 0])
    assert found.shape == (count, 1) and found.dtype == torch.int64
    seen = torch.bincount(found[:, 0], minlength=6) / count
    spread = (shares * (1 - shares) / count).sqrt()
    assert bool(((seen - shares).abs() <= 5 * spread).all())
    assert seen[shares == 0].sum() == 0


@pytest.mark.parametrize("prompts", [[[5, 6, 7]] * 3, [[5, 6, 7], [9], list(range(20, 40))]])
def test_the_emitted_graph_writes_what_the_model_writes(model, tmp_path: Path, prompts: list[list[int]]) -> None:
    emitted = FloatTexts(model, byte_tokenizer(), "cpu", tmp_path).emitted()
    assert isinstance(emitted, EmittedCausalLM)
    stop = frozenset({11, 12})
    one, two = (sample(lm, prompts, 40, _chances(len(prompts), 40, 4), stop=stop) for lm in (model, emitted))
    assert torch.equal(one, two)


@pytest.mark.cuda
def test_on_a_gpu_a_text_is_that_of_the_whole_prefix_each_time(tmp_path: Path) -> None:
    device = torch.device("cuda")
    emitted = FloatTexts(byte_model().to(device), byte_tokenizer(), device, tmp_path).emitted()
    prompts = [[5, 6, 7], [9, 5, 6]]
    by, ids = _chances(2, 24, 3), torch.tensor(prompts, device=device)
    found = sample(emitted, prompts, 24, by)
    for step in range(24):
        token = drawn(emitted(ids).logits[:, -1], by[:, step].to(device))
        assert token[:, 0].tolist() == found[:, step].tolist()
        ids = torch.cat([ids, token], dim=1)


def test_half_begin_as_texts_and_half_as_chats(model) -> None:
    tokenizer = byte_tokenizer()
    ids = self_samples(model, tokenizer, samples=5, length=24, seed=0)
    assert ids.shape == (5, 24) and ids.dtype == torch.int64
    opening = user_turn(tokenizer)
    assert tokenizer.decode(opening) == "<turn>user: "
    assert all(row[0] == start_token(tokenizer) for row in ids[::2].tolist())
    assert all(row[: len(opening)] == opening for row in ids[1::2].tolist())


def test_the_start_is_no_mark_of_a_turn() -> None:
    assert start_token(byte_tokenizer()) == 2
    assert start_token(byte_tokenizer(chat=False)) == 0


def test_without_a_chat_template_all_begin_as_texts(model) -> None:
    ids = self_samples(model, byte_tokenizer(chat=False), samples=3, length=8, seed=0)
    assert ids[:, 0].tolist() == [0, 0, 0]


def test_a_tokenizer_without_any_special_token_is_refused() -> None:
    class Bare:
        bos_token_id = eos_token_id = None
        chat_template = None

    with pytest.raises(DatasetError, match="'self' cannot be sampled"):
        start_token(Bare())


def test_a_sample_is_the_same_whichever_grow_beside_it(model) -> None:
    options = {"tokenizer": byte_tokenizer(), "length": 24, "seed": 4}
    whole = self_samples(model, samples=7, batch_size=64, **options)
    for size in (1, 2, 3):
        assert torch.equal(self_samples(model, samples=7, batch_size=size, **options), whole)
    assert torch.equal(self_samples(model, samples=5, **options), whole[:5])
    assert len({tuple(row) for row in whole[::2].tolist()}) == 4, "but each is another"
    assert not torch.equal(self_samples(model, samples=7, **options | {"seed": 5}), whole)


def test_how_many_grow_at_once_does_not_hang_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GB, and 2 · 2 layers · 2 heads · 8 numbers of four bytes a token."""
    size = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: pytest.fail("what is free was asked for"))
    on_cuda = type("Model", (), {"device": torch.device("cuda"), "dtype": torch.float32, "config": byte_model().config})
    assert [batch_of(on_cuda, length) for length in (1 << 10, 1 << 17)] == [2048, 10**10 // (256 << 17)]


def test_on_a_cpu_both_kinds_grow_together_and_on_a_gpu_each_for_itself() -> None:
    assert _batches(5, 2, 3, by_kind=False) == [[0, 1, 2], [3, 4]]
    assert _batches(9, 2, 3, by_kind=True) == [[0, 2, 4], [6, 8], [1, 3], [5, 7]]
    assert _batches(1, 2, 3, by_kind=True) == [[0]]


def test_samples_are_written_once_and_found_by_the_model_s_hash(model, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    first = FloatTexts(model, tokenizer, "cpu", tmp_path).samples(4, 16, 0)
    (file,) = tmp_path.glob("self-*.safetensors")
    before = file.stat().st_mtime_ns
    assert torch.equal(FloatTexts(model, tokenizer, "cpu", tmp_path).samples(4, 16, 0), first)
    assert file.stat().st_mtime_ns == before
    FloatTexts(byte_model(seed=1), tokenizer, "cpu", tmp_path).samples(4, 16, 0)
    assert len(list(tmp_path.glob("self-*.safetensors"))) == 2


def test_samples_and_answers_are_kept_under_all_that_decides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are not all: neither the base of RoPE nor the token that ends an answer is a tensor."""

    def made(change) -> FloatTexts:
        model = byte_model()
        change(model)
        return FloatTexts(model, byte_tokenizer(), "cpu", tmp_path)

    def theta(model) -> None:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}

    def ends(model) -> None:
        model.generation_config.eos_token_id = [1, 7]

    def moved(model) -> None:
        model.config.name_or_path = "elsewhere"

    plain = made(lambda model: None)
    assert made(moved).key == plain.key
    assert len({plain.key, made(theta).key, made(ends).key}) == 3
    plain.samples(2, 16, 0)
    monkeypatch.setattr("mxfx.calibration.keys._version", lambda: "another")
    plain.samples(2, 16, 0)
    assert len(list(tmp_path.glob("self-*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("samples", "shares", "counts"),
    [(8, (1, 1), [4, 4]), (7, (1, 2), [2, 5]), (5, (1, 1, 1), [2, 2, 1]), (1, (9, 1), [1, 0])],
)
def test_shares_sum_to_the_samples(samples: int, shares: tuple[float, ...], counts: list[int]) -> None:
    assert split_by_share(samples, shares) == counts


def test_sources_are_mixed_in_their_shares(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 400)
    tokenizer = byte_tokenizer()
    sources = [str(tmp_path / "a.txt"), "self", str(tmp_path / "b.txt")]
    written = torch.full((4, 16), 7)
    mixed = calibration_tokens(
        sources, tokenizer, samples=8, length=16, seed=1, shares=(1, 2, 1), writer=lambda *_: written
    )
    kinds = [tokenizer.decode(row[1:2]) if row[0] != 7 else "self" for row in mixed.ids]
    assert sorted(kinds) == ["a", "a", "b", "b", "self", "self", "self", "self"]
    assert kinds != sorted(kinds)


def test_one_source_alone_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of some length " * 30)
    options = {"samples": 4, "length": 16, "seed": 3}
    alone = load_tokens(tmp_path / "a.txt", byte_tokenizer(), **options)
    assert torch.equal(calibration_tokens([str(tmp_path / "a.txt")], byte_tokenizer(), **options).ids, alone.ids)


def test_self_without_a_model_is_refused() -> None:
    with pytest.raises(DatasetError, match="none is at hand"):
        calibration_tokens(["self"], byte_tokenizer(), samples=1, length=4, seed=0)


def test_a_part_of_the_own_samples_goes_on_from_other_texts(model, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(chr(33 + i % 90) for i in range(400)))
    tokenizer = byte_tokenizer()
    texts = FloatTexts(model, tokenizer, "cpu", tmp_path)
    found = calibration_tokens(
        [str(text), "self"],
        tokenizer,
        samples=10,
        length=80,
        seed=1,
        shares=(1, 4),
        continued=0.75,
        writer=texts.samples,
    )
    stream = torch.tensor(tokenizer(text.read_text())["input_ids"])
    begun = [any(torch.equal(stream[at : at + OPENING], row[:OPENING]) for at in range(337)) for row in found.ids]
    whole = [any(torch.equal(stream[at : at + 80], row) for at in range(321)) for row in found.ids]
    assert (sum(begun), sum(whole)) == (2 + 6, 2)
    assert found.notes == ()
    assert len(list(tmp_path.glob("self-*.safetensors"))) == 2


def test_what_goes_on_is_what_the_model_says_behind_its_opening(model) -> None:
    """The token behind each opening is drawn from the model's own distribution there."""
    openings = torch.arange(3 * 8).view(3, 8) + 20
    ids = self_samples(model, byte_tokenizer(), samples=3, length=12, seed=2, openings=openings)
    assert torch.equal(ids[:, :8], openings)
    assert torch.equal(ids[:, 8:9], drawn(model(openings).logits[:, -1], _chances(3, 12, 2)[:, 0]))


def test_openings_are_read_again_where_they_are_few_and_that_is_told(model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(33 + i % 90) for i in range(140)))
    writer = FloatTexts(model, byte_tokenizer(), "cpu", tmp_path).samples
    options = {"samples": 6, "length": 66, "seed": 0, "shares": (1, 5), "continued": 1.0, "writer": writer}
    found = calibration_tokens([str(tmp_path / "a.txt"), "self"], byte_tokenizer(), **options)
    assert found.notes == (
        f"openings for self, {tmp_path}/a.txt: 5 samples of 140 tokens, each token seen 2.3 times, at other offsets",
    )


def test_samples_no_longer_than_an_opening_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 400)
    options = {"samples": 2, "length": OPENING, "seed": 0, "continued": 1.0, "writer": lambda *_: None}
    with pytest.raises(DatasetError, match="leave nothing to write behind openings of 64"):
        calibration_tokens([str(tmp_path / "a.txt"), "self"], byte_tokenizer(), **options)
