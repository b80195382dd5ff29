"""The names of a model's phases. Needs no torch: options are read before it."""

PHASES = ("prefill", "decode")
