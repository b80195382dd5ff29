"""Rows of logits by the C kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from mxfx.ops.kernels import divergence as module
from mxfx.ops.kernels.build import library
from mxfx.ops.kernels.divergence import logit_rows

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason="no C compiler is installed here")

ROWS, VOCABULARY = 5, 3001


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def logits(request):
    generator = torch.Generator().manual_seed(0)
    actual = 4 * torch.randn(ROWS, VOCABULARY, generator=generator)
    expected = actual + torch.randn(ROWS, VOCABULARY, generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return actual.to(request.param), expected.to(request.param), targets


def test_scores_are_those_of_float64(logits):
    actual, expected, targets = logits
    found = logit_rows(actual, expected, targets=targets)
    log_p, log_q = (x.double().log_softmax(-1) for x in (actual, expected))
    torch.testing.assert_close(found.kl.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-6, atol=1e-6)
    wanted = log_p.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.loglikelihood.double(), wanted, rtol=1e-6, atol=2e-6)
    assert found.top.tolist() == actual.argmax(-1).tolist()
    assert found.expected_top.tolist() == expected.argmax(-1).tolist()


def test_the_gradient_is_that_of_the_mean_divergence(logits):
    actual, expected, _ = logits
    found = logit_rows(actual, expected, gradient=True)
    leaf = actual.double().requires_grad_()
    log_q = expected.double().log_softmax(-1)
    (log_q.exp() * (log_q - leaf.log_softmax(-1))).sum(-1).mean().backward()
    rounding = 2**-8 if actual.dtype == torch.bfloat16 else 1e-5
    error = (found.gradient.double() - leaf.grad).norm() / leaf.grad.norm()
    assert found.gradient.dtype == actual.dtype and error < rounding


def test_what_was_not_asked_is_not_there(logits):
    actual, *_ = logits
    found = logit_rows(actual)
    assert (found.loglikelihood, found.kl, found.expected_top, found.gradient) == (None, None, None, None)


def test_equal_logits_do_not_diverge(logits):
    actual, *_ = logits
    assert logit_rows(actual, actual).kl.abs().max() == 0


def test_the_first_of_equally_likely_tokens_is_the_likeliest():
    logits = torch.zeros(1, 100)
    logits[0, [40, 70]] = 1.0
    assert logit_rows(logits).top.item() == 40


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_left_to_the_definition(broken):
    logits = torch.zeros(2, 100)
    logits[1, 5] = broken
    assert logit_rows(logits) is None
    assert logit_rows(torch.zeros(2, 100), logits) is None


def test_other_dtypes_and_layouts_are_left_to_the_definition():
    assert logit_rows(torch.zeros(2, 100, dtype=torch.float64)) is None
    assert logit_rows(torch.zeros(100, 2).T) is None


def test_without_a_compiler_the_definition_runs(monkeypatch):
    monkeypatch.setattr(module, "library", lambda: "no C compiler is installed here")
    assert logit_rows(torch.zeros(2, 100)) is None


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="do not name a token"):
        logit_rows(torch.zeros(2, 100), targets=torch.tensor([1, 100]))
