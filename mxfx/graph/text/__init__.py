"""The printed form of a program, and back.

    mxfx-ir 1
    source "llama-tiny" LlamaForCausalLM
    config {"hidden_size": 64, …}
    dtype f32
    symbols batch in [1, 4096], seq in [1, 256]
    facts norms-raised
    weights
      @model.norm.weight : f32[64] #0123456789abcdef
      @lm_head.weight = @model.embed_tokens.weight
      @model.rotary_emb.inv_freq : f32[8] #fedcba9876543210 constant
    graph
      %input_ids = input : i64[batch, seq]
     model.layers.0.mlp.up_proj:
      %linear_5 = aten.linear(%x, @w) : bf16[batch, seq, 96] {input: mxint4@32 by "annotate rule 1"} <annotate>
      return %linear_14

One line a node: name, op, operands, the type of its result, then, where there are any, annotations in braces, notes as
JSON behind ``!``, and in angle brackets the passes that made or changed it. A value that is on a format's grid says so
behind its type (``in mxint4@32``). An operand that the node writes, a cache, is marked ``!``. A line ending in a colon
opens the nodes of a module path. Types are nominal (bf16 for the model's dtype, f32 for compute precision) until the
program is lowered. Weights are named by hash:
blake2b over dtype, shape and bytes.
"""

from mxfx.graph.text.fragment import SEPARATOR, parse_fragment
from mxfx.graph.text.parsing import parse
from mxfx.graph.text.printing import Line, Printer, Printout, to_text, type_text
from mxfx.graph.text.words import HashMismatch, TextError

__all__ = [
    "SEPARATOR",
    "HashMismatch",
    "Line",
    "Printer",
    "Printout",
    "TextError",
    "parse",
    "parse_fragment",
    "to_text",
    "type_text",
]
