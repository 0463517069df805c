"""A sweep's report: a self-contained HTML page, and Markdown with pictures beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from ..files import write_bytes, write_json
from ..sampling import grid, save_image
from ..text import markdown, printable
from .metrics import ACCURACY, FRECHET, METRICS, PICTURES, Result, group_by_curve
from .plots import draw
from .settings import Curve, format_scales
from .verdict import Verdict, verdict_of

MAX_HEIGHT = 112  # pixels of an image on the page
MAX_WARNINGS = 5  # warnings that are shown at once
Strips = dict[Curve, list[tuple[Result, Path]]]


def write_report(
    folder: Path,
    results: Sequence[Result],
    protocol: Mapping[str, Any],
    default_scale: float | None,
    labels: Sequence[str] = (),
) -> Verdict:
    """Write report.html, report.md, sweep.json, plots and image grids.

    Args:
        folder: of the sweep; the first images of each setting are in its folder `points`.
        protocol: what the results have in common, `Store.protocol`.
        default_scale: the model's default guidance scale.
        labels: names of the images in a strip, in order.

    Raises:
        ImportError: if matplotlib is missing.
    """
    results = sorted(results, key=lambda r: (*r.setting.curve, r.setting.guidance_scale))
    verdict = verdict_of(results, default_scale)
    strips: Strips = {}
    for curve, along in group_by_curve(results).items():
        paths = [folder / "points" / (result.pictures or "") for result in along]
        rows = [pair for pair in zip(along, paths, strict=True) if pair[1].is_file()]
        if rows:
            strips[curve] = rows
    at_default = [r for r in results if default_scale and r.setting.at_scale(default_scale)]
    context = {
        "results": results,
        "verdict": verdict,
        "protocol": protocol,
        "model": printable(protocol.get("model", "the model")),
        "description": printable(describe_protocol(protocol, results)),
        "at_default_scale": at_default,
        "metrics": [name for name in METRICS if any(name in r.metrics for r in results)],
        "curves": summarize_curves(results, verdict),
        "plots": draw(results, verdict, folder),
        "grids": draw_grids(strips, folder, min(PICTURES, protocol["num_images"])),
        "strips": strips,
        "labels": [printable(label) for label in labels],
    }
    verdict_json = {
        "text": str(verdict).splitlines(),
        "best": asdict(verdict.best),
        "sharpest": asdict(verdict.most_accurate),
        "front": [asdict(setting) for setting in verdict.front],
    }
    points = [{"point": asdict(result.setting), **result.to_json()} for result in results]
    content = {"verdict": verdict_json, "settings": protocol, "points": points}
    content["weights"] = protocol.get("weights")
    write_json(content, folder / "sweep.json")
    for name in ("report.md", "report.html"):
        text = _environment(folder).get_template(f"{name}.j2").render(context)
        write_bytes(text.encode(), folder / name)
    return verdict


def draw_grids(strips: Strips, folder: Path, columns: int) -> dict[Curve, str]:
    """Write a picture per curve, with a row per guidance scale and the same seeds in each column.

    Returns:
        {curve: file name}.
    """
    files = {}
    for curve, rows in strips.items():
        images = []
        for _, path in rows:
            strip = Image.open(path)
            width = strip.width // columns
            for i in range(columns):
                images.append(strip.crop((i * width, 0, (i + 1) * width, strip.height)))
        names = [f"scale {result.setting.scale_text}" for result, _ in rows]
        files[curve] = f"images-{curve.name}.png"
        save_image(grid(images, names, smallest=56), folder / files[curve])
    return files


def summarize_curves(results: Sequence[Result], verdict: Verdict) -> list[dict[str, Any]]:
    """For each curve: its unguided baseline, its best result and the harmful scales."""
    rows = []
    for curve, along in group_by_curve(results).items():
        harmful = [r.setting.guidance_scale for r in along if r.setting in verdict.harmful]
        baseline = along[0] if along[0].setting.guidance_scale == 0 else None
        best = min(along, key=lambda result: result.value(FRECHET))
        row = {"curve": curve, "baseline": baseline, "best": best}
        rows.append({**row, "harmful": format_scales(harmful)})
    return rows


def describe_protocol(protocol: Mapping[str, Any], results: Sequence[Result]) -> str:
    """How the results were measured, in one sentence."""
    reference, features, judge = protocol["reference"], protocol["features"], protocol["judge"]
    networks = f"features and judge: {features['network']}"
    if judge != features:
        judge_name = judge["network"] if judge else "none"
        networks = f"features: {features['network']}, judge: {judge_name}"
    conditional = {
        None: [],
        True: ["the denoiser gets the label"],
        False: ["the denoiser does not get the label, so that only guidance steers"],
    }
    free = (protocol.get("defaults") or {}).get("classifier_free_scale")
    devices = ", ".join(sorted({result.cost["device"] for result in results}))
    parts = [
        f"{protocol['num_images']:,} images per setting, labels in turn, the same seeds in each",
        f"compared with {reference['images']:,} images of {reference['name']} "
        f"({reference['split']})",
        networks,
        f"denoiser in {protocol['dtype']}",
        *conditional[protocol["conditional"]],
        *([f"classifier-free guidance at {free:g} in all, also without guidance"] if free else []),
        f"{results[0].cost['clock']} time on {devices}",
    ]
    return f"{'; '.join(parts)}."


def marks(result: Result, verdict: Verdict) -> list[tuple[str, bool]]:
    """What is special about a result: (text, whether it is good)."""
    setting = result.setting
    best, most_accurate = setting == verdict.best, setting == verdict.most_accurate
    candidates = (
        ("best", True, best),
        ("most accurate near the best", True, most_accurate and not best),
        ("Pareto-optimal", True, setting in verdict.front),
        ("worse than no guidance", False, setting in verdict.harmful),
    )
    return [(text, good) for text, good, holds in candidates if holds]


def _environment(folder: Path) -> Environment:
    """The templates' environment; HTML is escaped."""
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "markdown": markdown,
        "embed": lambda name: data_uri(folder / name),
        "embed_strip": partial(data_uri, max_height=MAX_HEIGHT),
        "number": "{:.12g}".format,
        "pretty_json": partial(json.dumps, indent=2),
        "width": lambda name: Image.open(folder / name).width,
    }
    environment.globals |= {"ACCURACY": ACCURACY, "FRECHET": FRECHET, "METRICS": METRICS}
    environment.globals |= {"MAX_WARNINGS": MAX_WARNINGS, "marks": marks}
    return environment


def data_uri(path: Path, max_height: int | None = None) -> str:
    """A PNG file as a data URI; an image higher than `max_height` pixels is scaled down."""
    content, kind, image = path.read_bytes(), "png", Image.open(path)
    if max_height is not None and image.height > max_height:
        size = (round(image.width * max_height / image.height), max_height)
        small, buffer = image.convert("RGB").resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        small.save(buffer, "WEBP", quality=88)
        content, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
