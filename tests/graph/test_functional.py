"""A program is functional and owes nothing to the device and dtype of its trace: rewritten so, or refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MiniCPM3Config

from mxfx.graph.errors import TraceError
from mxfx.graph.execute import execute
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.runtime.causal_lm import emit
from tests.programs import RAISE, passed, relative

WIDTH, VOCABULARY = 16, 40


class Toy(nn.Module):
    """A language model of one line: ``between`` maps hidden states ``(batch, seq, width)`` to hidden states."""

    def __init__(self, between) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=2, max_position_embeddings=64
        )
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.between = between

    def forward(self, input_ids: Tensor, position_ids=None, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.head(self.between(self, self.embed(input_ids))))


def toy(between, dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    return Toy(between).to(dtype).eval()


def in_place_slice(model: Toy, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., :8] = 0
    return x


def assembled(model: Toy, x: Tensor) -> Tensor:
    """What latent attention does with its keys."""
    out = x.new_empty(x.shape)
    out[..., :5] = x[..., 3:8]
    out[..., 5:].copy_(x[..., 5:] * 2)
    return out


def widened(model: Toy, x: Tensor) -> Tensor:
    """A buffer is float32 in the trace; what is multiplied in place keeps its own dtype."""
    x = x.clone()
    x *= model.seen + 1.5
    return x


def added(model: Toy, x: Tensor) -> Tensor:
    return x.clone().add_(1.5).mul_(x)


def read_before_and_behind(model: Toy, x: Tensor) -> Tensor:
    x = x * 2
    early = x + 1
    view = x[..., :4]
    half = x.div_(4)
    return half + x * early + torch.cat([view] * 4, -1)


def scattered(model: Toy, x: Tensor) -> Tensor:
    chosen = torch.topk(x, 3).indices
    kept = torch.zeros_like(x).scatter_(-1, chosen, 1.0)
    return x * kept


def softmax_in_float32(model: Toy, x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def sum_in_float32(model: Toy, x: Tensor) -> Tensor:
    return x / (1 + x.abs().sum(-1, keepdim=True, dtype=torch.float32)).to(x.dtype)


def counted(model: Toy, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    even = torch.arange(0, 2 * WIDTH, 2, device=x.device, dtype=torch.float32)
    return x + (places[:, None] * 0.25 + even).to(x.dtype)


def filled(model: Toy, x: Tensor) -> Tensor:
    half = torch.full((x.shape[0], 1, WIDTH), 0.5, dtype=x.dtype, device=x.device)
    ones = torch.ones(WIDTH, dtype=torch.float32, device=x.device)
    mask = torch.zeros(WIDTH, dtype=torch.bool, device=x.device)
    scalar = torch.scalar_tensor(0.75, dtype=x.dtype, device=x.device)
    return torch.where(mask, scalar, x + half) * ones.to(x.dtype) + torch.zeros_like(x, dtype=torch.float32).to(x.dtype)


def literal_tensor(model: Toy, x: Tensor) -> Tensor:
    return x * torch.tensor([0.5, 2.0], device=x.device).repeat(WIDTH // 2).to(x.dtype)


def chosen_by_a_list(model: Toy, x: Tensor) -> Tensor:
    return x + x[:, :, [3, 1]].repeat(1, 1, WIDTH // 2)


def scalar_literal(model: Toy, x: Tensor) -> Tensor:
    return torch.maximum(x, torch.tensor(-0.125, dtype=x.dtype, device=x.device))


def attended(model: Toy, x: Tensor) -> Tensor:
    """Attention inside a token; without a dropout it draws nothing."""
    parts = x.unflatten(-1, (4, -1))
    return torch.nn.functional.scaled_dot_product_attention(parts, parts, parts).flatten(-2)


def windows_from_the_last(model: Toy, x: Tensor) -> Tensor:
    """Windows overlap in memory: what torch asks of their strides would fix the least length."""
    windows = torch.nn.functional.pad(x.transpose(1, 2), (3, 0)).unfold(-1, 4, 1).flip(-1)
    return (windows * torch.tensor([1.0, 0.5, 0.25, 0.125], device=x.device).to(x.dtype)).sum(-1).transpose(1, 2)


REWRITTEN = (
    in_place_slice,
    assembled,
    added,
    widened,
    read_before_and_behind,
    scattered,
    softmax_in_float32,
    sum_in_float32,
    counted,
    filled,
    literal_tensor,
    chosen_by_a_list,
    scalar_literal,
    attended,
    windows_from_the_last,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def traced(between, dtype: torch.dtype = torch.float32) -> Program:
    program = trace(toy(between, dtype))
    verify(program)
    return program


@pytest.mark.parametrize("between", REWRITTEN, ids=lambda f: f.__name__)
def test_an_op_with_a_functional_and_free_form_gets_it(between) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 11))
    program = traced(between)
    for dtype in DTYPES:
        program.dtype = dtype
        expected = toy(between, dtype)(ids).logits
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        assert relative(execute(program, ids), expected) <= tolerance, dtype


@pytest.mark.parametrize(
    ("between", "traces"),
    [(assembled, 1), (added, 1), (scattered, 1), (read_before_and_behind, 2)],
    ids=lambda a: getattr(a, "__name__", str(a)),
)
def test_one_trace_is_enough_where_no_view_is_read_again(between, traces: int, monkeypatch) -> None:
    """A view that was taken before a write and is read behind it needs ``torch.export``'s own second trace."""
    again: list[str] = []
    right = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda *given: again.append("traced") or right(*given)
    )
    program = trace(toy(between), proven=False)
    verify(program)
    assert 1 + len(again) == traces


@pytest.mark.parametrize("between", [counted, literal_tensor], ids=lambda f: f.__name__)
def test_an_emitted_graph_moves_between_devices(between) -> None:
    graph = emit(passed(traced(between), RAISE)).to("meta")
    assert graph(torch.zeros(3, 11, dtype=torch.int64, device="meta")).shape == (3, 11, VOCABULARY)


def writes_a_buffer(model: Toy, x: Tensor) -> Tensor:
    model.seen.add_(x.mean((0, 1)))
    return x + model.seen


def draws(model: Toy, x: Tensor) -> Tensor:
    return x + torch.randn(WIDTH, device=x.device, dtype=x.dtype)


def drops_weights_of_attention(model: Toy, x: Tensor) -> Tensor:
    parts = x.unflatten(-1, (4, -1))
    return torch.nn.functional.scaled_dot_product_attention(parts, parts, parts, dropout_p=0.1).flatten(-2)


def asks_for_float64(model: Toy, x: Tensor) -> Tensor:
    return x.double().exp().to(x.dtype)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (writes_a_buffer, "the forward pass writes seen of the model"),
        (draws, "draws random numbers"),
        (drops_weights_of_attention, "draws random numbers"),
        (asks_for_float64, "asks for torch.float64: neither the model's dtype nor float32"),
    ],
    ids=lambda a: getattr(a, "__name__", ""),
)
def test_what_has_no_such_form_is_refused_with_the_reason(between, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        trace(toy(between))


def test_keys_assembled_in_place_are_those_of_the_model() -> None:
    """Latent attention writes keys into memory of its own; erased as dead code, that memory was never written."""
    torch.manual_seed(0)
    config = MiniCPM3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=131, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 131, (2, 13))
    assert relative(execute(trace(model), ids), model(ids, use_cache=False).logits) < 1e-6
