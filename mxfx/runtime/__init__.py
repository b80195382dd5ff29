"""The emitted model as an HF-compatible causal LM, its KV cache, generation and evaluation."""
