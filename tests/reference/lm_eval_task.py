"""lm-eval's `wikitext` on documents at hand: what its metrics are held against where the hub is out of reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.wikitext import preprocess_wikitext


def local_task(pages: Sequence[str]) -> Any:
    """Same output type, metrics and counts as lm-eval's task; no detokenizer."""
    dataset = {"test": Dataset.from_dict({"page": list(pages)})}
    return ConfigurableTask(
        config={
            "task": "wikitext",
            "custom_dataset": lambda **_: dataset,
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda doc: doc["page"],
            "process_results": preprocess_wikitext.process_results,
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
            "metadata": {"version": 2.0},
        }
    )
