"""A sweep's report: one HTML page that needs nothing else, and Markdown with pictures beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..sampling.pictures import grid, save_image
from ..utils import write_bytes, write_json
from .curves import draw
from .figures import METRICS, PICTURES, Result
from .page import SCRIPT, STYLE
from .points import Line, line_name, number, scales_name
from .verdict import ACCURACY, CRITERION, Verdict, verdict_of

WIDEST = 112  # pixels of an image on the page
MOST = 5  # warnings that are shown at once
EXPLAINED = {
    "judge agrees": "how often a classifier that never guided gives the wanted label, the first of its answers.",
    "Frechet distance": "between generated and real images, as Gaussians in the features of the network named above; "
    "0: the same. It is an FID only where that network is Inception's.",
    "kernel distance": "the same question without Gaussians: the squared maximum mean discrepancy of a cubic kernel.",
    "precision": "the share of generated images that are as real ones are; recall: the share of real images that "
    "are among the kinds of generated ones.",
    "density": "how deep generated images are within the real ones' neighbourhoods; coverage: the share of real images "
    "that have a generated one in theirs.",
    "diversity in a class": "how far apart two images of a label are, real ones being 1; below 1: more alike.",
    "class score": "whether the judge is sure of each image and sees all kinds; 1 to the number of labels.",
    "cost": "rows of the networks' forward passes and seconds for one image, of the sampling alone.",
}


def write_report(
    folder: Path,
    results: Sequence[Result],
    settings: Mapping[str, Any],
    own_scale: float | None,
    labels: Sequence[str] = (),
) -> Verdict:
    """Write report.html, report.md, sweep.json, curves and grids of images.

    Args:
        folder: of the sweep; the points' pictures are in its folder `points`.
        settings: that the points have in common.
        own_scale: the scale that the model guides with when it isn't told another.
        labels: names of the images in a row of a point's pictures, in order.

    Raises:
        ImportError: where matplotlib is missing.
    """
    results = sorted(
        results,
        key=lambda one: (
            one.point.scheduler,
            one.point.num_inference_steps,
            one.point.guided,
            one.point.guidance_scale,
        ),
    )
    verdict = verdict_of(results, own_scale)
    curves = draw(results, verdict, folder)
    grids = draw_grids(results, folder, min(PICTURES, settings["num_images"]))
    write_json(
        {
            "verdict": {
                "text": str(verdict).splitlines(),
                "best": asdict(verdict.best),
                "sharpest": asdict(verdict.sharpest),
                "front": [asdict(one) for one in verdict.front],
            },
            "settings": settings,
            "points": [{"point": asdict(one.point), **one.to_json()} for one in results],
        },
        folder / "sweep.json",
    )
    write_bytes(markdown(results, verdict, settings, curves, grids).encode(), folder / "report.md")
    write_bytes(
        html(results, verdict, settings, curves, folder, own_scale, labels).encode(),
        folder / "report.html",
    )
    return verdict


def by_line(results: Sequence[Result]) -> dict[Line, list[Result]]:
    """{scheduler, steps, guided: its points, that without guidance first}."""
    none = {one.point.line[:2]: one for one in results if one.point.guidance_scale == 0}
    found: dict[Line, list[Result]] = {}
    for one in results:
        if one.point.guidance_scale:
            first = none.get(one.point.line[:2])
            found.setdefault(one.point.line, [first] if first else []).append(one)
    for (scheduler, steps), one in none.items():
        if not any(line[:2] == (scheduler, steps) for line in found):
            found[scheduler, steps, ""] = [one]
    return found


def draw_grids(results: Sequence[Result], folder: Path, count: int) -> dict[Line, str]:
    """A PNG a line, a row a scale, the same seeds in each column, which are `count`; {line: its file}."""
    found = {}
    for line, along in by_line(results).items():
        rows = [
            (one, Image.open(folder / "points" / one.pictures))
            for one in along
            if one.pictures and (folder / "points" / one.pictures).exists()
        ]
        if rows:
            scheduler, steps, guided = line
            path = (
                folder
                / f"images-{scheduler}-{steps}-steps{'-' * bool(guided)}{guided}.png".replace(
                    ", ", "-"
                ).replace(" ", "-")
            )
            width = rows[0][1].width // count
            images = [
                strip.crop((i * width, 0, (i + 1) * width, strip.height))
                for _, strip in rows
                for i in range(count)
            ]
            save_image(
                grid(
                    images,
                    [f"scale {number(one.point.guidance_scale)}" for one, _ in rows],
                    smallest=56,
                ),
                path,
            )
            found[line] = path.name
    return found


def _columns(results: Sequence[Result]) -> list[str]:
    return [name for name in METRICS if any(name in one.figures for one in results)]


def _summary(
    results: Sequence[Result], verdict: Verdict
) -> Iterator[tuple[Line, Result | None, Result, list[Result]]]:
    """A line, its point without guidance, the one with the lowest Frechet distance, those that are worse than none."""
    for line, along in by_line(results).items():
        yield (
            line,
            next((one for one in along if one.point.guidance_scale == 0), None),
            min(along, key=lambda one: one.value(CRITERION)),
            [one for one in along if one.point in verdict.harmful],
        )


# Markdown


def markdown(
    results: Sequence[Result],
    verdict: Verdict,
    settings: Mapping[str, Any],
    curves: Mapping[str, str],
    grids: Mapping[Line, str],
) -> str:
    """For a model card, beside whose file the pictures are."""
    parts = [
        f"# Guidance of {settings.get('model', 'the model')}, measured",
        _made_with(settings, results),
        "\n".join(f"- {one}" for one in verdict.words),
    ]
    if verdict.warnings:
        parts.append(
            "> **Warning: guidance can be worse than none.**\n>\n"
            + "\n".join(f"> - {one}" for one in verdict.warnings)
        )
    parts += [f"![{text}]({name}.png)\n\n*{text}*" for name, text in curves.items()]
    accuracy = any(ACCURACY in one.figures for one in results)
    head = [
        "scheduler, steps",
        "no guidance",
        "best scale",
        results[0].title(CRITERION),
        *(["judge agrees", "without"] if accuracy else []),
        "worse than none",
    ]
    rows = [
        [
            line_name(line),
            none.shown(CRITERION) if none else "",
            number(best.point.guidance_scale),
            best.shown(CRITERION),
            *([best.shown(ACCURACY), none.shown(ACCURACY) if none else ""] if accuracy else []),
            scales_name(one.point.guidance_scale for one in worse) or "-",
        ]
        for line, none, best, worse in _summary(results, verdict)
    ]
    parts += ["## Each scheduler", _table(head, rows)]
    if best := next(
        (line for line in (verdict.best.line, verdict.sharpest.line) if line in grids),
        next(iter(grids), None),
    ):
        parts.append(
            f"![A row a guidance scale, the same seeds: {line_name(best)}]({grids[best]})\n\n"
            f"*{line_name(best)}: a row a guidance scale, the same seeds in each column.*"
        )
    names = _columns(results)
    head = [
        "point",
        *(results[0].title(name) for name in names),
        "evaluations",
        f"{results[0].cost['clock']} s an image",
        "",
    ]
    rows = [
        [
            str(one.point),
            *(one.shown(name) for name in names),
            _evaluations(one),
            f"{one.cost['seconds']:.2g}",
            ", ".join(_marks(one, verdict)),
        ]
        for one in results
    ]
    parts.append(
        f"<details><summary>All {len(results)} points</summary>\n\n{_table(head, rows)}\n\n</details>"
    )
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _evaluations(result: Result) -> str:
    return f"{result.cost['network_evaluations']:.3g} + {result.cost['classifier_evaluations']:.3g}"


def _marks(result: Result, verdict: Verdict) -> list[str]:
    return [
        text
        for text, holds in (
            ("best", result.point == verdict.best),
            (
                "sharpest of the best",
                result.point == verdict.sharpest and verdict.sharpest != verdict.best,
            ),
            ("worth its cost", result.point in verdict.front),
            ("worse than none", result.point in verdict.harmful),
        )
        if holds
    ]


def _made_with(settings: Mapping[str, Any], results: Sequence[Result]) -> str:
    reference, features, judge = settings["reference"], settings["features"], settings["judge"]
    parts = [
        f"{settings['num_images']:,} images a point, of all labels in turn, the same seeds at every point",
        f"compared with {reference['images']:,} images of {reference['name']} ({reference['split']})",
        f"features and judge: {features['network']}"
        if judge == features
        else f"features: {features['network']}, judge: {judge['network'] if judge else 'none'}",
        f"network in {settings['dtype']}",
        {
            False: "the network isn't told the label, so that guidance alone steers",
            True: "the network is told the label",
            None: "",
        }[settings["conditional"]],
        f"{results[0].cost['clock']} time of {', '.join(sorted({one.cost['device'] for one in results}))}",
    ]
    return f"{'; '.join(part for part in parts if part)}."


# HTML


def html(
    results: Sequence[Result],
    verdict: Verdict,
    settings: Mapping[str, Any],
    curves: Mapping[str, str],
    folder: Path,
    own_scale: float | None,
    labels: Sequence[str] = (),
) -> str:
    """One page that loads nothing: pictures, style and script are in it."""
    model = escape(str(settings.get("model", "the model")))
    charts = "".join(
        f'<figure class="card curve"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_inlined(folder / f"{name}-dark.png")}"><img src="{_inlined(folder / f"{name}.png")}" '
        f'width="{Image.open(folder / f"{name}.png").width * 2 // 3}" alt="{escape(text)}"></picture>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for name, text in curves.items()
    )
    explained = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in EXPLAINED.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Guidance of {model}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Guidance of {model}, measured</h1>
<p class="soft">{escape(_made_with(settings, results))}</p>
{_tiles(results, verdict, own_scale)}
{_warnings(results, verdict)}
{"".join(f"<p>{escape(one)}</p>" for one in verdict.words)}
<h2>Curves</h2>
{charts}
<h2>Each scheduler</h2>
<p class="soft">The best scale of each scheduler, number of steps and interval, and where guidance does harm.</p>
{_summary_table(results, verdict)}
<h2>Images</h2>
<p class="soft">A row a guidance scale. Images in a column have the same seed and label.</p>
{_grids(results, verdict, folder, labels)}
<h2>All points</h2>
<p class="soft">Intervals of 95% by the bootstrap are below the figures. A click on a title sorts.</p>
{_all_points(results, verdict)}
<h2>What the figures mean</h2>
<dl>{explained}</dl>
<details><summary>All settings</summary><pre>{escape(json.dumps(settings, indent=2))}</pre></details>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _tiles(results: Sequence[Result], verdict: Verdict, own_scale: float | None) -> str:
    measured = {one.point: one for one in results}
    tiles = [_tile(f"lowest {results[0].title(CRITERION)}", measured[verdict.best], CRITERION)]
    if ACCURACY in measured[verdict.sharpest].figures:
        tiles.append(
            _tile("most accurate within its interval", measured[verdict.sharpest], ACCURACY)
        )
    own = [one for one in results if one.point.guidance_scale == own_scale]
    if own_scale and own:
        worse = sum(one.point in verdict.harmful for one in own)
        tiles.append(
            f'<div class="card tile"><span class="name">the model\'s own scale</span>'
            f"<b>scale {number(own_scale)}</b><span>worse than no guidance in {worse} of {len(own)} "
            "settings</span></div>"
        )
    tiles.append(
        f'<div class="card tile"><span class="name">worth their cost</span><b>{len(verdict.front)} of '
        f"{len(results)}</b><span>points; {len(verdict.harmful)} are worse than no guidance</span></div>"
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, result: Result, figure: str) -> str:
    point = result.point
    return (
        f'<div class="card tile"><span class="name">{escape(name)}</span><b>scale {number(point.guidance_scale)}'
        f"</b><span>{escape(line_name(point.line))}</span><span>{result.title(figure)} "
        f"{result.shown(figure, True)}</span></div>"
    )


def _warnings(results: Sequence[Result], verdict: Verdict) -> str:
    if not verdict.warnings:
        return (
            '<div class="card fine"><strong>Guidance does no harm here.</strong> No scale is worse than no '
            "guidance beyond the intervals of the figures.</div>"
        )
    guided = sum(one.point.guidance_scale > 0 for one in results)
    shown = "".join(f"<li>{escape(one)}</li>" for one in verdict.warnings[:MOST])
    more = "".join(f"<li>{escape(one)}</li>" for one in verdict.warnings[MOST:])
    more = (
        f"<details><summary>{len(verdict.warnings) - MOST} more</summary><ul>{more}</ul></details>"
        if more
        else ""
    )
    return (
        f'<div class="card warning" role="alert"><strong>Guidance can be worse than none</strong>, and is at '
        f"{len(verdict.harmful)} of {guided} guided points.<ul>{shown}</ul>{more}</div>"
    )


def _summary_table(results: Sequence[Result], verdict: Verdict) -> str:
    names = [name for name in (CRITERION, ACCURACY, "recall") if name in results[0].figures]
    head = [
        "scheduler, steps",
        "best scale",
        *(f"{results[0].title(name)}: without \u2192 best" for name in names),
        "worse than none at scale",
    ]
    rows = []
    for line, none, best, worse in _summary(results, verdict):
        cells = [
            f"<td>{escape(line_name(line))}</td>",
            f"<td>{number(best.point.guidance_scale)}</td>",
        ]
        cells += [
            f"<td>{none.shown(name) if none else '-'} \u2192 <b>{best.shown(name)}</b></td>"
            for name in names
        ]
        scales = scales_name(one.point.guidance_scale for one in worse)
        cells.append(f'<td><span class="mark bad">{scales}</span></td>' if worse else "<td>-</td>")
        rows.append(
            f"<tr{' class=best' if line == verdict.best.line else ''}>{''.join(cells)}</tr>"
        )
    return _html_table(head, rows)


def _all_points(results: Sequence[Result], verdict: Verdict) -> str:
    names = _columns(results)
    head = [
        "scheduler",
        "steps",
        "guided from",
        "scale",
        "",
        *(results[0].title(name) for name in names),
        "evaluations: network + classifier",
        f"{results[0].cost['clock']} s an image",
    ]
    rows = []
    for one in results:
        point, cost = one.point, one.cost
        marks = "".join(
            f'<span class="mark{" bad" if text.startswith("worse") else " good"}">{text}</span>'
            for text in _marks(one, verdict)
        )
        total = cost["network_evaluations"] + cost["classifier_evaluations"]
        cells = [
            f"<td>{escape(point.scheduler)}</td>",
            f"<td>{point.num_inference_steps}</td>",
            f"<td>{point.guided or ('all' if point.guidance_scale else '-')}</td>",
            f"<td>{number(point.guidance_scale)}</td>",
            f'<td class="marks">{marks}</td>',
            *(_cell(one, name) for name in names),
            f'<td data-value="{total}">{_evaluations(one)}</td>',
            f'<td data-value="{cost["seconds"]}">{cost["seconds"]:.2g}</td>',
        ]
        rows.append(f"<tr{' class=best' if point == verdict.best else ''}>{''.join(cells)}</tr>")
    real = {
        name: results[0].figures[name].get("real") for name in names if name in results[0].figures
    }
    cells = [
        f"<td>{METRICS[name].shown(real[name]) if real.get(name) is not None else ''}</td>"
        for name in names
    ]
    foot = f'<td colspan="5">the real images themselves</td>{"".join(cells)}<td></td><td></td>'
    return _html_table(head, rows, "sortable", foot)


def _html_table(head: Sequence[str], rows: Sequence[str], kind: str = "", foot: str = "") -> str:
    titles = [f"<button>{escape(one)}</button>" if kind else escape(one) for one in head]
    cells = "".join(f'<th scope="col">{title}</th>' for title in titles)
    foot = f"<tfoot><tr>{foot}</tr></tfoot>" if foot else ""
    return (
        f'<div class="card scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}'
        f"</tbody>{foot}</table></div>"
    )


def _cell(result: Result | None, name: str) -> str:
    if result is None or name not in result.figures:
        return "<td>-</td>"
    metric, (low, high) = METRICS[name], result.ends(name)
    ends = f"<small>{metric.shown(low)} to {metric.shown(high)}</small>" if low < high else ""
    return f'<td data-value="{result.value(name)!r}">{result.shown(name)}{ends}</td>'


def _grids(results: Sequence[Result], verdict: Verdict, folder: Path, labels: Sequence[str]) -> str:
    found = []
    for line, along in by_line(results).items():
        rows = [(one, folder / "points" / one.pictures) for one in along if one.pictures]
        rows = [(one, path) for one, path in rows if path.exists()]
        if not rows:
            continue
        cells = (
            f'<span></span><div class="labels">{"".join(f"<span>{escape(one)}</span>" for one in labels)}</div>'
            if labels
            else ""
        )
        for one, path in rows:
            mark = (
                ' <span class="mark bad">worse than none</span>'
                if one.point in verdict.harmful
                else ""
            )
            cells += (
                f'<div class="scale">scale {number(one.point.guidance_scale)}{mark}</div>'
                f'<img src="{_small(path)}" alt="{escape(str(one.point))}" loading="lazy">'
            )
        opened = " open" if line in (verdict.best.line, verdict.sharpest.line) else ""
        found.append(
            f'<details class="card"{opened}><summary>{escape(line_name(line))}</summary>'
            f'<div class="grid">{cells}</div></details>'
        )
    return "".join(found)


def _inlined(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _small(path: Path) -> str:
    """A strip as a data URI: as it is, or, of large images, smaller."""
    strip = Image.open(path)
    if strip.height <= WIDEST:
        return _inlined(path)
    content = io.BytesIO()
    strip.convert("RGB").resize(
        (round(strip.width * WIDEST / strip.height), WIDEST), Image.Resampling.LANCZOS
    ).save(content, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
