"""Files of evaluation results, `.eval_results/METRIC.yaml`, that the Hub reads in a model's repository.

A result is a number on a dataset of the Hub, which is its "benchmark". The format is that of
huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

MARK = "# Written by guided-diffusers from the metrics in this repository."


def write_eval_results(folder: Path, results: Sequence[EvalResult]) -> None:
    """Write the results of a model card, a file for each metric, over those of an earlier card.

    Files that a user wrote or edited the first line of are kept.
    """
    directory = folder / EVAL_RESULTS_FOLDER
    for path in directory.glob("*.yaml"):
        if path.read_bytes().partition(b"\n")[0].strip() == MARK.encode():  # also with \r\n
            path.unlink()
    by_metric: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        entry = EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=result.metric_type,
            value=result.metric_value,
            notes=result.metric_name,
        )
        by_metric.setdefault(result.metric_type, []).append(entry)
    for metric, entries in by_metric.items():
        path = directory / f"{metric}.yaml"
        if not path.exists():
            directory.mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            path.write_text(f"{MARK}\n{text}")
