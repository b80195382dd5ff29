"""Evaluation: lm-eval's metrics by their definition, cut documents, paired ratios, and clear errors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext import preprocess_wikitext
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from mxfx.evaluation.evaluate import evaluate, measure, text_domain, token_perplexity
from mxfx.evaluation.results import EvalResult, EvaluationError, Piece, ratio_with_stderr
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.texts import cut_documents, detokenized
from mxfx.evaluation.windows import token_windows
from tests.reference.lm_eval_task import local_task

BOS = 0
PAGES = [
    "The first page , of two\nlines and 3 @,@ 000 words .",
    " a page that begins and ends with a blank, zwölf 零 ",
    "one more " * 12,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; BOS exists and is not put before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32):
    """Two layers, logits far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=BOS,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    folder = tmp_path / "pages"
    folder.mkdir()
    for index, page in enumerate(PAGES):
        (folder / f"{index}.txt").write_text(page, encoding="utf-8")
    return folder


def loglikelihood(model, tokenizer, text: str) -> float:
    """Of one document that fits one window, given BOS; log-softmax in float32."""
    ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].float()
    return logits.log_softmax(-1).double()[range(len(ids) - 1), ids[1:]].sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_are_those_of_their_definition(tokenizer, pages: Path, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    result = evaluate(model, tokenizer, eval_data=pages)
    total = sum(loglikelihood(model, tokenizer, page) for page in PAGES)
    words = sum(len(re.split(r"\s+", page)) for page in PAGES)
    size = sum(len(page.encode()) for page in PAGES)
    assert result.word_perplexity == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert result.byte_perplexity == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert result.token_perplexity == pytest.approx(math.exp(-total / result.tokens), rel=1e-5)
    assert result.tokens == size


def test_words_and_bytes_are_counted_as_in_lm_evals_wikitext() -> None:
    for page in PAGES:
        counted = preprocess_wikitext.process_results({"page": page}, [-7.0])
        found = detokenized(page)
        assert (found.words, found.bytes) == (counted["word_perplexity"][1], counted["byte_perplexity"][1])


@pytest.mark.parametrize("max_length", [24, 64, 256])
def test_perplexities_are_those_of_lm_eval(model, tokenizer, pages: Path, max_length: int) -> None:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, softmax_dtype="float32")
    theirs = evaluator.evaluate(lm, {"wikitext": local_task(PAGES)}, bootstrap_iters=0)["results"]["wikitext"]
    mine = evaluate(model, tokenizer, eval_data=pages, max_length=max_length)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert getattr(mine, metric) == pytest.approx(theirs[f"{metric},none"], rel=1e-5)


def test_bos_is_put_once_where_the_tokenizer_puts_it_itself(model, tokenizer, pages: Path) -> None:
    class Beginning:
        """Begins every text with BOS of its own accord, as Llama 3's does."""

        is_fast = False
        bos_token_id = BOS

        def __call__(self, text, add_special_tokens: bool = True, **options: bool) -> dict:
            ids = tokenizer(text, **options)["input_ids"]
            nested = isinstance(text, list)
            lead = [BOS] if add_special_tokens else []
            return {"input_ids": [lead + row for row in ids] if nested else lead + ids}

        def decode(self, ids):
            return tokenizer.decode(ids)

    mine = evaluate(model, Beginning(), eval_data=pages)
    assert mine.word_perplexity == pytest.approx(evaluate(model, tokenizer, eval_data=pages).word_perplexity)


def _brute_force_kl(model, other, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        q, p = (m(ids[None]).logits[0].double().log_softmax(-1) for m in (model, other))
    return (q.exp() * (q - p)).sum(-1)


@pytest.mark.parametrize("keep_bytes", [0, 40_000, 1 << 30])
def test_divergence_is_that_of_its_definition(model, tokenizer, pages: Path, keep_bytes: int) -> None:
    """However many of the float model's logits are kept, and the second time as the first."""
    other = tiny_model(seed=1)
    domain = text_domain("pages", tokenizer, path=pages, max_length=32)
    reference = FloatLogits(lambda: model, keep_bytes=keep_bytes)
    first, second = (measure(other, domain, tokenizer, batch_size=2, reference=reference) for _ in range(2))
    kl = torch.cat([_brute_force_kl(model, other, w.ids)[-w.scored :] for w in domain.windows])
    assert first.divergence == second.divergence
    found = first.divergence
    assert found.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    for q, value in ((0.5, found.median), (0.9, found.p90), (0.99, found.p99), (0.999, found.p999)):
        assert value == pytest.approx(float(kl.quantile(q)), rel=1e-4)
    assert sum(found.histogram) == pytest.approx(1.0)
    assert found.worst[0].kl == pytest.approx(float(kl.max()), rel=1e-4)
    assert found.worst[0].text in "".join(PAGES) or found.worst[0].text.startswith("<s>")


def test_a_model_does_not_diverge_from_itself(model, tokenizer, pages: Path) -> None:
    found = evaluate(model, tokenizer, eval_data=pages, reference=FloatLogits(lambda: model)).divergence
    assert found.mean == pytest.approx(0.0, abs=1e-7)
    assert (found.agreement, found.agreement_stderr) == (1.0, 0.0)


def test_the_float_model_is_built_once_and_let_go(model, tokenizer, pages: Path) -> None:
    built = []
    reference = FloatLogits(lambda: built.append(1) or model)
    for _ in range(2):
        evaluate(tiny_model(seed=1), tokenizer, eval_data=pages, reference=reference)
        reference.release()
    assert len(built) == 1


def test_batching_changes_nothing(model, tokenizer, pages: Path) -> None:
    one = evaluate(model, tokenizer, eval_data=pages, batch_size=1, max_length=32)
    three = evaluate(model, tokenizer, eval_data=pages, batch_size=3, max_length=32)
    assert three.word_perplexity == pytest.approx(one.word_perplexity, rel=1e-5)
    assert [window.tokens for window in three.windows] == [window.tokens for window in one.windows]


def test_windows_hold_every_token_once_and_sum_to_the_documents(model, tokenizer, pages: Path) -> None:
    result = evaluate(model, tokenizer, eval_data=pages, max_length=32)
    assert sum(window.tokens for window in result.windows) == result.tokens
    assert max(window.tokens for window in result.windows) == 32
    of_windows = math.fsum(window.loglikelihood for window in result.windows)
    assert of_windows == pytest.approx(math.fsum(piece.loglikelihood for piece in result.documents), rel=1e-6)


def test_a_window_is_never_longer_than_the_model_allows(model, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 120)
    assert evaluate(model, tokenizer, eval_data=tmp_path, max_length=2048).max_length == 256


def test_the_hubs_task_is_lm_evals_own(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored is the detokenized page, counted are the words and bytes of the original one."""
    asked = {}

    def load_dataset(path, name, **_):
        asked.update(path=path, name=name)
        rows = datasets.Dataset.from_dict({"page": PAGES})
        return datasets.DatasetDict({"train": rows, "validation": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = evaluate(model, tokenizer)
    assert asked == {"path": "EleutherAI/wikitext_document_level", "name": "wikitext-2-raw-v1"}
    texts = [preprocess_wikitext.wikitext_detokenizer({"page": page}) for page in PAGES]
    assert texts != PAGES
    total = sum(loglikelihood(model, tokenizer, text) for text in texts)
    words = sum(len(re.split(r"\s+", page)) for page in PAGES)
    assert result.word_perplexity == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert (result.source, result.task) == ("hub", "wikitext")


def test_an_unreachable_hub_says_to_give_local_documents(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EvaluationError, match=r"(?s)no route to host.*--eval-data"):
        evaluate(model, tokenizer)


@pytest.mark.parametrize("limit", [40, 64, 99])
def test_a_limit_is_kept_and_cuts_between_words(tokenizer, limit: int) -> None:
    cut = cut_documents(PAGES, tokenizer, limit_tokens=limit, max_length=24)
    assert limit - 12 < sum(len(text.encode()) for text in cut) <= limit
    for beginning, page in zip(cut, PAGES, strict=False):
        assert page.startswith(beginning)
        assert beginning == page or page[len(beginning)].isspace()


def test_a_tokenizer_without_offsets_cuts_the_same(tokenizer) -> None:
    class Plain:
        is_fast = False

        def __call__(self, text: str, **options: bool) -> dict:
            assert "return_offsets_mapping" not in options
            return tokenizer(text, **options)

    for limit in (10, 40, 64, 99):
        options = {"limit_tokens": limit, "max_length": 24}
        assert cut_documents(PAGES, Plain(), **options) == cut_documents(PAGES, tokenizer, **options)


def test_a_limit_reads_the_beginnings_of_several_documents(tokenizer) -> None:
    cut = cut_documents(PAGES, tokenizer, limit_tokens=60, max_length=20)
    assert len(cut) == 3 and all(len(text.encode()) <= 20 for text in cut)


def test_a_limit_above_all_text_takes_all(tokenizer) -> None:
    assert cut_documents(PAGES, tokenizer, limit_tokens=10_000, max_length=24) == PAGES


def test_a_limit_below_one_word_is_refused(tokenizer) -> None:
    with pytest.raises(EvaluationError, match="limit_tokens=2 does not hold one word"):
        cut_documents(PAGES, tokenizer, limit_tokens=2, max_length=24)


def test_evaluate_keeps_to_its_limit(model, tokenizer, pages: Path) -> None:
    result = evaluate(model, tokenizer, eval_data=pages, limit_tokens=60, max_length=32)
    assert 40 < result.tokens <= 60 and result.limit_tokens == 60


def test_an_unknown_task_and_a_senseless_limit_are_refused(model, tokenizer, pages: Path) -> None:
    with pytest.raises(EvaluationError, match="unknown evaluation task 'wikitext103'; expected 'wikitext'"):
        evaluate(model, tokenizer, task="wikitext103", eval_data=pages)
    with pytest.raises(EvaluationError, match="limit_tokens=0"):
        evaluate(model, tokenizer, eval_data=pages, limit_tokens=0)


def test_a_text_of_one_token_is_refused(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(EvaluationError, match=r"one\.txt: the tokenizer makes 1 of it, expected at least 2 tokens"):
        text_domain("one", tokenizer, path=tmp_path / "one.txt")


def test_evaluation_data_that_is_missing_is_named(model, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"evaluation data .*absent: no such file or folder"):
        evaluate(model, tokenizer, eval_data=tmp_path / "absent")


def test_a_result_is_json(model, tokenizer, pages: Path) -> None:
    result = evaluate(model, tokenizer, eval_data=pages)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert EvalResult(**data | {"documents": result.documents, "windows": result.windows}) == result
    assert [Piece(**piece) for piece in data["windows"]] == result.windows


def test_token_perplexity_is_exp_of_the_mean_cross_entropy(model) -> None:
    torch.manual_seed(1)
    windows = [torch.randint(257, (length,)) for length in (16, 16, 9)]
    measured = token_perplexity(model, windows, batch_size=2)
    with torch.no_grad():
        scores = [
            torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            for ids in windows
        ]
    assert measured.perplexity == pytest.approx(torch.cat(scores).mean().exp().item(), rel=1e-5)
    assert [window.tokens for window in measured.windows] == [15, 15, 8]


def test_token_perplexity_refuses_a_window_without_a_scored_token(model) -> None:
    with pytest.raises(EvaluationError, match="two tokens in each"):
        token_perplexity(model, [torch.tensor([1])])


def test_token_windows_are_the_joined_text(tokenizer) -> None:
    windows = token_windows(["ab", "cde"], tokenizer, length=3)
    assert [tokenizer.decode(window) for window in windows] == ["ab\n", "\ncd"]


def scored(loglikelihoods: list[float], words: list[int]) -> EvalResult:
    pieces = [Piece(score, count, count, count) for score, count in zip(loglikelihoods, words, strict=True)]
    return EvalResult(
        task="wikitext",
        source="text",
        text_sha="same",
        word_perplexity=0.0,
        byte_perplexity=0.0,
        bits_per_byte=0.0,
        token_perplexity=0.0,
        stderr={},
        documents=pieces,
        windows=pieces,
        tokens=sum(words),
        max_length=8,
        limit_tokens=None,
        seconds=0.0,
    )


def test_the_ratio_of_a_result_to_itself_is_one_without_error() -> None:
    result = scored([-10.0, -25.0, -7.0], [5, 9, 3])
    for metric in ("word_perplexity", "byte_perplexity", "token_perplexity"):
        ratio = ratio_with_stderr(result, result, metric)
        assert (ratio.ratio, ratio.stderr) == (1.0, 0.0)


def test_the_ratio_is_that_of_the_perplexities(model, tokenizer, pages: Path) -> None:
    one = evaluate(model, tokenizer, eval_data=pages, max_length=32)
    other = evaluate(tiny_model(seed=1), tokenizer, eval_data=pages, max_length=32)
    assert ratio_with_stderr(other, one).ratio == pytest.approx(other.word_perplexity / one.word_perplexity, rel=1e-6)
    assert ratio_with_stderr(other, one, "token_perplexity").ratio == pytest.approx(
        other.token_perplexity / one.token_perplexity, rel=1e-6
    )


def test_what_all_documents_share_adds_no_error_to_the_ratio() -> None:
    """The documents differ greatly, yet the second model is worse by the same 0.1 nats a word in each."""
    words = [100, 400, 250]
    one = scored([-300.0, -2000.0, -500.0], words)
    other = scored([-310.0, -2040.0, -525.0], words)
    ratio = ratio_with_stderr(other, one)
    assert ratio.ratio == pytest.approx(math.exp(0.1))
    assert ratio.stderr == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_the_ratio_is_what_resampling_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    estimates, errors = [], []
    for _ in range(400):
        words = (100 + 300 * torch.rand(40, generator=generator)).int().tolist()
        noise = torch.randn(40, generator=generator).tolist()
        float_scores = [-3.0 * count for count in words]
        worse = [score - 0.2 * count - 10 * z for score, count, z in zip(float_scores, words, noise, strict=True)]
        ratio = ratio_with_stderr(scored(worse, words), scored(float_scores, words))
        estimates.append(ratio.ratio)
        errors.append(ratio.stderr)
    spread = torch.tensor(estimates).std().item()
    assert torch.tensor(errors).mean().item() == pytest.approx(spread, rel=0.15)


def test_one_document_gives_a_ratio_without_a_standard_error() -> None:
    assert ratio_with_stderr(scored([-12.0], [4]), scored([-8.0], [4])).stderr is None


def test_results_of_other_text_are_not_compared() -> None:
    one = scored([-10.0, -25.0], [5, 9])
    with pytest.raises(EvaluationError, match="text or max_length differs"):
        ratio_with_stderr(one, dataclasses.replace(one, text_sha="other"))


def test_results_of_another_tokenizer_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="count tokens differently"):
        ratio_with_stderr(scored([-10.0, -25.0], [5, 9]), scored([-10.0, -25.0], [5, 8]))


def test_a_ruined_model_has_infinite_perplexity_rather_than_an_error() -> None:
    ruined = ratio_with_stderr(scored([-1e6, -1e6], [1, 1]), scored([-1.0, -1.0], [1, 1]))
    assert ruined.ratio == math.inf


@pytest.mark.real_model
def test_the_converted_model_knows_the_capital_of_france(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        following = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
    assert "4-bit" in model.config.mxfx_note
