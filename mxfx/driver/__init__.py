"""One job: model, tokenizer, tokens, probe, float reference, caches, run directory."""
