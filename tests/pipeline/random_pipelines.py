"""Random pipelines over every pass that a user can ask for, with random options, formats and selections."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

FORMATS = (
    "mxint4@32/mse", "mxint4@16", "mxint8@16", "mxint3@8/ceil", "mxint2@7", "mxint6@999", "mxfp4_e2m1@32/mse",
    "mxfp6_e3m2@5", "mxfp8_e4m3@32", "mxfp8_e5m2@16/even", "mxint4@1", "nvfp4", "nvfp4@16/four-over-six",
    "minifloat_e4m3",
)  # fmt: skip
SELECTIONS = ("layers: 0", "layers: -1", "role: mlp", "role: attention", "role: o_proj, down_proj", ".*layers.*")
_PRODUCTS = ("attention, mlp", "mlp", "attention", "down_proj", "q_proj, qkv_proj, latent", "attention, mlp, router")
_ATTENTION = ("kv", "k", "v", "q", "probs", "softmax")

Draw = Callable[[Random], str]


def _options(random: Random, **choices: tuple[object, ...]) -> str:
    """``{a=1,b=x}`` with some of the options, each of its choices; quoted where the one-line form wants it."""
    drawn = {key: random.choice(values) for key, values in choices.items() if random.random() < 0.5}
    written = (f"{key}={_written(value)}" for key, value in drawn.items())
    return "{" + ",".join(written) + "}" if drawn else ""


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)


def _annotate(random: Random) -> str:
    rules = []
    if random.random() < 0.9:
        rules.append(_rule(random, random.choice(_PRODUCTS), ("weight", "input", "bias", "output"), 0.4))
    if random.random() < 0.6:
        rules.append(_rule(random, "attention", _ATTENTION, 0.25))
    if random.random() < 0.15:
        rules.append(_rule(random, random.choice(("embed", "head", "embed, head")), ("weight", "input"), 0.5))
    if random.random() < 0.2:
        rules.insert(
            0, _rule(random, "attention, mlp", ("weight", "input"), 0.7, random.choice(("layers='0'", "layers='-1'")))
        )
    if random.random() < 0.1:
        rules.append("{match='.*',rope=" + random.choice(FORMATS) + "}")
    rules = rules or [_rule(random, "mlp", ("weight",), 1)]
    return "annotate{unmatched=warn,partial=true,rule=[" + ",".join(rules) + "]}"


def _rule(random: Random, role: str, operands: tuple[str, ...], likely: float, more: str = "") -> str:
    named = [operand for operand in operands if random.random() < likely] or [operands[0]]
    if "kv" in named:
        named = [operand for operand in named if operand not in ("k", "v")]
    one = random.choice(FORMATS)
    formats = [f"{operand}={random.choice(FORMATS) if random.random() < 0.3 else one}" for operand in named]
    return "{" + ",".join([f"role='{role}'", *([more] if more else []), *formats]) + "}"


def _pass(name: str, **choices: tuple[object, ...]) -> Draw:
    return lambda random: name + _options(random, **choices)


#: Passes in an order that makes sense, how likely each is, and what is drawn of it.
PASSES: tuple[tuple[float, Draw], ...] = (
    (0.6, _pass("fuse-norm")),
    (0.93, _annotate),
    (0.2, _pass("rotate-residual", kind=("hadamard", "block-hadamard"), block=(8, 32, 7), signs=(False,))),
    (0.2, _pass("rotate-value", block=(0, 4, 16), signs=(False,), select=SELECTIONS)),
    (0.2, _pass("rotate-qk", block=(0, 4, 16), select=SELECTIONS)),
    (0.2, _pass("scale-channels", sites=(("up",), ("value", "key"), ("norm",)), alpha=(0, 0.3, 1), select=SELECTIONS)),
    (0.15, _pass("permute-channels", block=(8, 32), select=SELECTIONS)),
    (0.3, _pass("transform-inputs", kind=("hadamard", "wush", "wush"), block=(16, 32, 5), signs=(True,), samples=(2,),
                select=SELECTIONS)),
    (0.3, _pass("transform-kv", kind=("hadamard", "wush", "wush"), block=(0, 8, 16), keys=(False,), values=(False,),
                samples=(2,), select=SELECTIONS)),
    (0.08, _pass("transform-search", candidates=(("none", "hadamard-16", "wush-16"), ("scaled-32",)), rows=(32,),
                 select=SELECTIONS)),
    (0.12, _pass("allocate-bits", bits=(3.5, 4.5, 6), samples=(2,), select=SELECTIONS)),
    (0.05, _pass("rotation-search", sites=(("q_proj", "kv_cache"), ("down_proj",)), samples=(2,), block=(0, 8))),
    (0.2, _pass("online-rotation", sites=(("linear",), ("kv_cache", "qk_matmul")), block=(0, 8, 16),
                select=SELECTIONS)),
    (0.12, _pass("expand-attention", select=SELECTIONS)),
    (0.35, _pass("gptq", refine=(1,), order=("block", "none"), exponents=("sweep", "rule"), asymmetric=(0.25,),
                 min_expert_tokens=(1, 8), quantized_inputs=(True, False), samples=(2,), max_layers=(1,),
                 activations=("cpu", "disk"), damp=(0.1,), select=SELECTIONS)),
    (0.8, _pass("insert-fake-quant", select=SELECTIONS[:1])),
    (0.7, _pass("quantize-kv-cache", select=SELECTIONS[:1])),
    (0.2, _pass("distill", steps=(1, 2), batch_size=(2,), scope=("model", "layer"), recompute=(True,),
                accumulate=(2,), tune=(("gains", "biases"), ("transforms",), ("embedding", "head")),
                select=SELECTIONS)),
    (0.75, _pass("round-weights", untie=(True,), select=SELECTIONS[:1])),
    (0.05, _pass("round-weights", untie=(True,))),
)  # fmt: skip
_EMIT = ("emit{device=cuda}", "emit{packed=false}", "emit{device=cuda,packed=false}")


def random_pipeline(seed: int) -> str:
    """Mostly in an order that makes sense, or pure chance would seldom come past three passes; sometimes not."""
    random = Random(seed)
    drawn = [draw(random) for likely, draw in PASSES if random.random() < likely]
    if random.random() < 0.15:
        first, second = random.randrange(len(drawn)), random.randrange(len(drawn))
        drawn[first], drawn[second] = drawn[second], drawn[first]
    if random.random() < 0.05:
        drawn.append(random.choice(drawn))
    if not any(one.startswith("fuse-norm") for one in drawn) and random.random() < 0.8:
        drawn = [one for one in drawn if not one.startswith("rotate-residual")]
    settings = [random.choice(_EMIT)] if random.random() < 0.4 else []
    return ",".join([*settings, *drawn])
