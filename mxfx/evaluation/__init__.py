"""How good an emitted model is: texts, perplexity, divergence from the float model, tasks, paired comparison."""
