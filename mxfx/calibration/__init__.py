"""Data sets, layer-by-layer streaming execution, statistics, scores and their caches."""
