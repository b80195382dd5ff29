"""Programs: what a traced model is, before and after every pass."""
