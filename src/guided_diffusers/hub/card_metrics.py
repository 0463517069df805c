"""Metrics in the JSON files of a model's folder, as rows for plots and sections of the model card.

The folder's `metrics` are {name: content}: each JSON file's content under the file's name, and
figures.json's entries under their own names. Training writes `held_out` and `guided-diffusers
inspect` writes `levels`, one row a noise level. Rows with `agreement` or a distance measure
guided images. An `evaluation.json` has its metrics as `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.logging import get_logger

from ..checks import read_json
from ..diagnosis import COLUMNS
from ..text import markdown, markdown_table, printable
from ..utils import weights_digest
from ..weights import saved_variants, weight_files

Row = dict[str, Any]
Metrics = Mapping[str, Any]

logger = get_logger(__name__)
MAX_ROWS = 20
MAX_UNFOLDED_ROWS = 3
#: metrics of guided images, and the titles of their plots
GUIDED_METRICS = {
    "agreement": "judge accuracy",
    "frechet_distance": "Frechet distance (lower is better)",
    "sliced_wasserstein": "sliced Wasserstein distance (lower is better)",
    "recall": "recall",
}
GUIDED_DISTANCES = ("frechet_distance", "sliced_wasserstein")
OLD_NAMES = {"judge_agreement": "agreement"}
#: entries that are not shown as numbers
HIDDEN = ("made_of", "options", "command", "verdict", "settings", "mismatches", "weights")


def stale_metrics(folder: Path, model: Any) -> set[str]:
    """Names of the folder's metrics that were measured with other weights, with a warning of each.

    Metrics have the hash of the weights that they are of as `weights`; older ones don't.

    Args:
        model: the model in the folder.
    """
    measured = {}
    for name, entry in read_metrics(folder).items():
        if isinstance(entry, dict) and isinstance(entry.get("weights"), str):
            measured[name] = entry["weights"]
    known = known_weights(folder, model) if measured else set()
    stale = {name for name, weights in measured.items() if weights not in known}
    for name in sorted(stale):
        logger.warning(
            f"{folder}: the metrics {name!r} are of other weights ({measured[name]}) than those in "
            f"the folder ({', '.join(sorted(known))}) and are left out; measure them again"
        )
    return stale


def known_weights(folder: Path, model: Any) -> set[str]:
    """Hashes of the weights in a folder: of each network, in all variants, and of the pipeline."""
    from ..sampling import weights_hash

    hashes = set()
    for config in folder.rglob("config.json"):
        for variant in saved_variants(config.parent):
            hashes.add(weights_digest(weight_files(config.parent, variant)))
    if isinstance(model, DiffusionPipeline):
        hashes.add(weights_hash(model))
    return hashes


def read_metrics(folder: Path) -> dict[str, Any]:
    """{name: content} of the metrics in a folder's JSON files."""
    metrics: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        is_config = path.name in ("model_index.json", "config.json") or ".index." in path.name
        if not is_config:
            metrics[path.stem] = read_json(path)
    return {**metrics.pop("figures", {}), **metrics}


def training_options(metrics: Metrics) -> dict[str, Row]:
    """{name: options} of all metrics that a training wrote."""
    options = {}
    for name, entry in metrics.items():
        if isinstance(entry, dict) and isinstance(entry.get("options"), dict):
            options[name] = entry["options"]
    return options


def is_rows(value: Any) -> bool:
    """Whether it is a list of dictionaries, not an empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def level_rows(metrics: Metrics) -> dict[str, list[Row]]:
    """{name: rows} of all metrics with one row a noise level, in order of the timestep."""
    by_name = {}
    for name, entry in metrics.items():
        rows = (entry.get("held_out") or entry.get("levels")) if isinstance(entry, dict) else None
        if is_rows(rows) and all(is_number(row.get("timestep")) for row in rows):
            by_name[name] = sorted(rows, key=lambda row: row["timestep"])
    return by_name


def guided_rows(metrics: Metrics) -> dict[str, list[Row]]:
    """{name: rows} of all metrics of guided images; a row's `guidance` describes the guidance."""
    by_name = {}
    for name, entry in metrics.items():
        if not isinstance(entry, dict):
            continue
        named = [{"guidance": key, **row} for key, row in entry.items() if isinstance(row, dict)]
        for rows in (entry.get("rows"), named):
            rows = [_guided_row(row) for row in rows] if is_rows(rows) else []
            if rows and all(GUIDED_METRICS.keys() & row.keys() for row in rows):
                by_name[name] = rows
    return by_name


def _guided_row(row: Row) -> Row:
    row = {OLD_NAMES.get(key, key): value for key, value in row.items()}
    scale = row.get("guidance_scale", row.get("scale"))
    if scale is None:
        description = "guided"
    else:
        description = f"scale {scale:g}" if scale else "unguided"
    return {"guidance": description, **row}


def sections(metrics: Metrics, pictures: Mapping[str, str]) -> list[dict[str, Any]]:
    """Variables of the card's sections, one an entry of the metrics, guided images first.

    Args:
        pictures: {name: file} of the entries' plots.
    """
    guided = guided_rows(metrics)
    names = [name for name, entry in metrics.items() if isinstance(entry, dict)]
    variables = []
    for name in sorted(names, key=lambda name: name not in guided):
        entry, tables = metrics[name], []
        for key, rows in {"rows": guided[name]}.items() if name in guided else entry.items():
            if key not in HIDDEN and is_rows(rows):
                folded = name not in guided and len(rows) > MAX_UNFOLDED_ROWS
                tables.append((table_title(key, rows), rows_table(rows), folded))
        if rows := evaluation_rows(entry):
            tables.insert(0, ("Metrics of generated images", rows_table(rows), False))
        variables.append(
            {
                "title": markdown(words(name)),
                "guided": name in guided,
                "entry": entry,
                "scalars": ", ".join(scalars(entry)),
                "picture": pictures.get(name),
                "tables": tables,
                "unrecorded": not isinstance(entry.get("weights"), str),
            }
        )
    return variables


def evaluation_rows(entry: Mapping[str, Any]) -> list[Row]:
    """The metrics of an `evaluation.json` with their intervals; empty for any other entry."""
    rows = []
    metrics = entry.get("figures")
    for name, metric in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(metric, dict) and is_number(metric.get("value")):
            low, high = metric.get("interval") or (None, None)
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            title = metric.get("name", words(name))
            rows.append({"metric": title, "value": metric["value"], "interval": interval})
    return rows


def scalars(entry: Mapping[str, Any]) -> list[str]:
    """The single numbers and texts of an entry, as "name: value"."""
    texts, hidden = [], set(HIDDEN)
    if "held_out" in entry:  # a training's, of which the template shows these in a sentence
        hidden |= {"step", "images"}
    for key, value in entry.items():
        if key not in hidden and isinstance(value, (int, float, str)):
            texts.append(f"{markdown(words(key))}: {cell(value)}")
    return texts


def rows_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, without nested values; at most `MAX_ROWS`."""
    columns = list(rows[0])
    if "sigma_over_alpha" in rows[0]:  # a diagnosis, which has many
        columns = [column for _, column, _ in COLUMNS if column in rows[0]]
    columns = [c for c in columns if c not in HIDDEN and not isinstance(rows[0][c], (list, dict))]
    cells = []
    for row in rows[:MAX_ROWS]:
        cells.append([cell(row.get(column)) for column in columns])
    return markdown_table([markdown(words(column)) for column in columns], cells)


def table_title(key: str, rows: Sequence[Row]) -> str:
    if key in ("held_out", "levels", "rows"):
        return "All metrics"
    return printable(f"{words(key)}: {len(rows)} rows")


def words(name: str) -> str:
    return name.replace("_", " ")


def cell(value: Any) -> str:
    """A value in a Markdown table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return markdown(value)
