"""What `--help` of every command ends with: calls of it that work."""

from __future__ import annotations

from collections.abc import Mapping

import typer

#: Command → calls, each with what it is for.
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "run": (
        "mxfx run passes_configs/tutorial_a_rtn.toml --model DIR --eval news.txt --out OUT",
        "mxfx run A.toml B.toml --model DIR --data TEXT --eval wikitext,code/,arc_easy --eval-data DOCS --out OUT",
        "mxfx run FILE --set calibration.samples=8 --set pass.gptq.damp=0.05 --strict -v",
    ),
    "check": (
        "mxfx check FILE --model DIR",
        "mxfx check FILE --model DIR --context 32768 --batch 8",
        "mxfx check FILE --model DIR --numbers",
    ),
    "passes": ("mxfx passes", "mxfx passes gptq"),
    "config show": (
        "mxfx config show passes_configs/tutorial_c_rotation_search.toml",
        "mxfx config show FILE --device cuda",
    ),
    "config schema": ("mxfx config schema > pipeline.schema.json",),
    "opt": (
        "mxfx opt llama-tiny --passes 'raise-norm,fuse-norm' --print-ir-per-match",
        "mxfx opt DIR --passes FILE --print-ir-after-change --timing",
        "mxfx opt llama-tiny | mxfx opt - --passes 'raise-rope'",
    ),
    "bisect": ("mxfx bisect OUT/NAME --max-kl 0.1", "mxfx bisect FILE --model DIR --data TEXT"),
    "repro": ("mxfx repro OUT/NAME/repro --shrink",),
    "weights": ("mxfx weights OUT/NAME", "mxfx weights OUT/NAME --changed model.layers.0.mlp.down_proj.weight"),
    "report": ("mxfx report OUT",),
    "collect": (
        "mxfx collect hf:gsm8k:main:train:question,answer --model M --out gsm8k.pt",
        "mxfx collect jsonl:tickets.jsonl --template 'Ticket: {body}' --model M --samples 64 --length 512 --out t.pt",
        "mxfx collect lm_eval:gsm8k:20 --model M --config collector.toml",
    ),
    "search": (
        "mxfx search passes_configs/tutorial_b_gptq.toml --model M --data calib.pt --out rotation_decisions.json",
    ),
    "eval": (
        "mxfx eval OUT/A OUT/B --tasks news.txt,chat,arc_easy --task-limit 200",
        "mxfx eval OUT/NAME --tasks news.txt --phase decode",
        "mxfx eval DIR --tasks news.txt --float MODEL --no-write",
    ),
    "compare": ("mxfx compare OUT/A OUT/B", "mxfx compare OUT/A OUT2/A --floor 0.02"),
    "generate": (
        "mxfx generate OUT/NAME --prompt 'Once upon' --max-new-tokens 64",
        "mxfx generate OUT/NAME --chat --prompt 'Why is the sky blue?' --greedy",
        "cat letter.txt | mxfx generate OUT/NAME --chat --prompt -",
    ),
    "export": (
        "mxfx export OUT/best_w4a4kv4 --to hf --bake --out baked",
        "mxfx export OUT/mxfp4_weights --to compressed-tensors --out packed",
        "mxfx export OUT/mxint4_weights --to gguf --out gguf",
    ),
    "import": ("mxfx import checkpoint --out imported", "mxfx eval imported --tasks news.txt --float MODEL"),
    "serve": ("mxfx serve OUT/NAME --port 8000",),
    "doctor": ("mxfx doctor",),
    "help": ("mxfx help", "mxfx help formats"),
}


#: Typer reads a text with an escape sequence as it stands; of others it makes ``main:train:x`` a picture of a train.
_AS_IT_STANDS = "\x1b[m"


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Put its examples below the options of every command of ``app``; raises ``KeyError`` for one that has none."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.strip("_")
        command.epilog = _AS_IT_STANDS + "\n\n".join(("Examples:", *EXAMPLES[f"{group} {name}".strip()]))
