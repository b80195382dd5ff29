"""How good an emitted model is: texts, perplexity, lm-eval tasks, paired comparison."""
