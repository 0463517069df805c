"""Sweeps: what is measured once, what the figures are, what is said of them, and a page that needs nothing else."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from test_guidance import NAMES, quiet, small_classifier, small_unet

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.cli import main
from guided_diffusers.evaluation import evaluate, load_network, open_generated, open_real
from guided_diffusers.evaluation.metrics import sliced_wasserstein
from guided_diffusers.sampling import sample, sample_to_folder
from guided_diffusers.speed import computing_in
from guided_diffusers.sweep import (
    Result,
    Store,
    SweepSetting,
    pareto_front,
    sweep,
    sweep_grid,
    verdict_of,
    write_report,
)
from guided_diffusers.sweep.learn import knot_levels, labelled_features, nelder_mead
from guided_diffusers.sweep.metrics import METRICS
from guided_diffusers.sweep.run import _check_learn
from guided_diffusers.utils import scheduler_for, scheduler_name

SETTINGS = {
    "model": "m",
    "weights": "w",
    "num_images": 12,
    "dtype": "float32",
    "conditional": None,
    "reference": {"name": "data", "split": "test", "images": 30},
    "judge": {"network": "judge"},
    "features": {"network": "judge"},
}


def made_up(
    point: SweepSetting,
    distance: float = 1.0,
    accuracy: float | None = 0.5,
    seconds: float | None = None,
    error: float = 0.1,
    pictures: str | None = None,
) -> Result:
    figures = {"frechet_distance": distance, "recall": 0.5, "precision": 0.7}
    figures |= {} if accuracy is None else {"top_1": accuracy}
    steps = point.num_inference_steps
    guided = steps * (point.guidance_stop - point.guidance_start) * (point.guidance_scale > 0)
    cost = {
        "network_evaluations": steps,
        "classifier_evaluations": guided,
        "clock": "CPU",
        "device": "cpu",
        "seconds": steps + guided if seconds is None else seconds,
    }
    return Result(
        point,
        {
            name: {"value": value, "interval": [value - error, value + error]}
            for name, value in figures.items()
        },
        cost,
        pictures,
    )


# the points


def test_every_combination_once_and_no_guidance_once_for_all_intervals() -> None:
    found = sweep_grid([3, 0, 1], ["ddim", "ddpm"], [25, 10], [(0, 1), (0.1, 0.8)])
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2 * 2)
    assert [point.name for point in found[:5]] == [
        "ddim-10-steps-scale-0",
        "ddim-10-steps-scale-1",
        "ddim-10-steps-scale-3",
        "ddim-10-steps-scale-1-from-0.1-to-0.8",
        "ddim-10-steps-scale-3-from-0.1-to-0.8",
    ]
    assert len({point.name for point in found}) == len(found)
    assert SweepSetting("ddim", 5, 0.0) in sweep_grid([2], ["ddim"], [5])
    assert sweep_grid([1, 1.0, 0], ["ddim", "ddim"], [5, 5]) == sweep_grid([1], ["ddim"], [5])
    assert found[4].call_arguments == {
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "guidance_start": 0.1,
        "guidance_stop": 0.8,
    }


def test_how_guidance_acts_is_part_of_a_point() -> None:
    found = sweep_grid(
        [3], ["ddim"], [10], algorithms=["output", "strang"], every=[1, 4], tolerances=[0.1]
    )
    assert [point.name for point in found] == [
        "ddim-10-steps-scale-0",
        *(
            f"ddim-10-steps-scale-3-{how}"
            for how in (
                "output-every-1",
                "output-every-4",
                "output-tolerance-0.1",
                "strang-every-1",
                "strang-every-4",
                "strang-tolerance-0.1",
            )
        ),
    ]
    assert len({point.curve for point in found}) == 7 and {point.unguided for point in found} == {
        found[0]
    }
    assert found[-1].call_arguments == {
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "guidance_start": 0.0,
        "guidance_stop": 1.0,
        "guidance_algorithm": "strang",
        "guidance_tolerance": 0.1,
    }
    assert str(found[-2]) == "ddim, 10 steps, guided strang, every 4, scale 3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([float("inf")], ["ddim"], [5]), "scales: inf is not allowed; use finite"),
        (([float("nan")], ["ddim"], [5]), "scales: nan"),
        (([1], ["ddim"], [0]), "steps: 0 is not allowed"),
        (([1], [], [5]), "at least one value of each"),
        (([1], ["ddim"], [5], [(0, 1)], ["euler"]), "algorithms: euler is not allowed"),
        (([1], ["ddim"], [5], [(0, 1)], [None], [0]), "every: 0 is not"),
        (([1], ["ddim"], [5], [(0, 1)], [None], [1.5]), "every: 1.5 is not"),
        (([1], ["ddim"], [5], [(0, 1)], [None], [], [0.0]), "tolerances: 0.0 is not"),
        (([1], ["ddim"], [5], [(0.5, 0.5)]), "intervals: 0.5:0.5"),
        (([1], ["ddim"], [5], [(0, 1.5)]), "0:1.5"),
    ],
)
def test_points_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep_grid(*given)


def test_a_scheduler_has_one_name() -> None:
    own = DDIMScheduler(prediction_type="v_prediction")
    for names in (
        ("ddim", "DDIM", "DDIMScheduler"),
        ("dpmsolver", "dpmsolver++", "DPMSolverMultistepScheduler"),
        ("sde-dpmsolver++", "SDE-DPMSolver++"),
        ("euler", "EulerDiscreteScheduler"),
        ("dpmsolver++3m", "DPMSolver++3M"),
        ("dpmsolver++-thresholding", "DPMSolver++-Thresholding"),
    ):
        found = [scheduler_for(own, name) for name in names]
        assert len({scheduler_name(one) for one in found}) == 1
        assert all(one.config.prediction_type == "v_prediction" for one in found)
        assert scheduler_name(scheduler_for(own, scheduler_name(found[0]))) == scheduler_name(
            found[0]
        )
    sde = scheduler_for(own, "sde-dpmsolver++")
    assert (
        isinstance(sde, DPMSolverMultistepScheduler)
        and sde.config.algorithm_type == "sde-dpmsolver++"
    )
    third = scheduler_for(own, "dpmsolver++3m-thresholding").config
    assert (third.algorithm_type, third.solver_order, third.thresholding) == (
        "dpmsolver++",
        3,
        True,
    )
    assert (sde.config.solver_order, sde.config.thresholding) == (2, False)
    for options in (
        {"solver_order": 1},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ):
        mine = DPMSolverMultistepScheduler(**options)  # by its own name a scheduler stays as it is
        same = scheduler_for(mine, scheduler_name(mine)).config
        assert {name: same[name] for name in options} == options


# the store


def test_nothing_is_measured_twice_and_what_is_broken_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, asked = sweep_grid([1, 3], ["ddim"], [5, 10]), []

    def measure(point: SweepSetting) -> Result:
        asked.append(point)
        return made_up(point, 1 / (1 + point.guidance_scale))

    assert Store(tmp_path, SETTINGS).fill(wanted, measure) == 6 and asked == wanted
    assert Store(tmp_path, SETTINGS).fill(wanted, measure) == 0 and len(asked) == 6
    found = {one.setting: one for one in Store(tmp_path, SETTINGS).all()}
    assert found == {point: made_up(point, 1 / (1 + point.guidance_scale)) for point in wanted}

    path = Store(tmp_path, SETTINGS).path(wanted[2])
    whole = path.read_text()
    for broken in (whole[:-40], "", "[]", "{}", whole.replace('"value": 0.25', '"value": null')):
        path.write_text(broken)
        assert Store(tmp_path, SETTINGS).fill(wanted, measure) == 1 and asked.pop() == wanted[2]
        assert path.read_text() == whole
        assert f"{path} is unreadable" in caplog.text
        caplog.clear()
    assert sorted(one.name for one in path.parent.iterdir()) == sorted(
        f"{point.name}.json" for point in wanted
    )


def test_points_of_other_settings_are_refused_before_the_work(tmp_path: Path) -> None:
    Store(tmp_path, SETTINGS).write(made_up(SweepSetting("ddim", 5, 1.0)))
    for other, said in (
        ({"num_images": 20}, "num_images was 12, is 20"),
        ({"weights": "v"}, "weights was w, is v"),
        ({"reference": {**SETTINGS["reference"], "images": 31}}, "reference.images was 30, is 31"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Store(tmp_path, SETTINGS | other).all()
    moved = {"model": "elsewhere", "reference": {**SETTINGS["reference"], "name": "moved"}}
    assert len(Store(tmp_path, SETTINGS | moved).all()) == 1


def test_a_point_is_made_by_one_process_and_freed_when_that_is_killed(tmp_path: Path) -> None:
    """Another process holds the second of two points: the first is measured meanwhile, the second when it is killed."""
    store, wanted = Store(tmp_path, SETTINGS), sweep_grid([1], ["ddim"], [5])
    with store.claim(wanted[1]) as mine:
        assert mine
    code = (
        "import sys, time, filelock; held = filelock.FileLock(sys.argv[1]); held.acquire(); "
        "print(flush=True); time.sleep(600)"
    )
    lock = str(tmp_path / ".locks" / f"{wanted[1].name}.lock")
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    asked = []

    def measure(point: SweepSetting) -> Result:
        asked.append(point)
        if len(asked) == 1:
            with store.claim(wanted[1]) as mine:
                assert not mine
            other.send_signal(signal.SIGKILL)
            other.wait(60)
        return made_up(point)

    try:
        assert other.stdout.readline()
        assert store.fill(wanted, measure, wait=0.05) == 2 and asked == wanted
    finally:
        other.kill()
        other.wait(60)


def test_a_point_that_another_process_makes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (none, guided) = Store(tmp_path, SETTINGS), sweep_grid([1], ["ddim"], [5])
    store.write(made_up(none))
    slept: list[float] = []
    with store.claim(guided):

        def made_elsewhere(seconds: float) -> None:
            slept.append(seconds)
            store.write(made_up(guided))

        monkeypatch.setattr(time, "sleep", made_elsewhere)
        assert (
            Store(tmp_path, SETTINGS).fill(
                [none, guided], lambda point: pytest.fail("measured twice"), 0.5
            )
            == 0
        )
    assert slept == [0.5]


# the verdict


def test_a_warning_where_guidance_is_worse_than_none_and_only_there() -> None:
    none, one, three, eight = sweep_grid([1, 3, 8], ["ddim"], [10])
    harmless = [
        made_up(none, 1.0, 0.8),
        made_up(one, 0.5, 0.9),
        made_up(three, 1.15, 0.95),
        made_up(eight, 1.2, 0.65),
    ]
    found = verdict_of(
        harmless, 3.0
    )  # all intervals reach +-0.1, so the last ones overlap with that of none
    assert not found.warnings and not found.harmful and found.best == found.most_accurate == one
    assert any(
        "The model's default scale, 3, is never worse than no guidance" in word
        for word in found.findings
    )

    found = verdict_of([*harmless[:2], made_up(three, 1.21, 0.95), made_up(eight, 0.9, 0.59)], 3.0)
    assert set(found.harmful) == {three, eight}
    assert (
        "model's default scale, 3, is worse than no guidance; ddim, 10 steps: Frechet distance "
        "1.21 (1.11 to 1.31) against 1 "
        "(0.9 to 1.1)" in found.warnings[0]
    )
    assert (
        "guidance at scales 3, 8 is worse than no guidance; at 8 judge accuracy 59.0% (49.0% to "
        "69.0%) against 80.0%"
        in found.warnings[1]
        and len(found.warnings) == 2
    )
    assert "Warning: " in str(found)
    found = verdict_of([*harmless[:3], made_up(eight, 2.0, 0.9)], 3.0)  # not the own scale, but one
    assert len(found.warnings) == 1 and "at scale 8 is worse" in found.warnings[0]


def test_harm_is_to_the_same_scheduler_and_steps() -> None:
    ddim, ddpm = sweep_grid([1], ["ddim"], [10]), sweep_grid([1], ["ddpm"], [10])
    results = [
        made_up(ddim[0], 1.0),
        made_up(ddim[1], 2.0),
        made_up(ddpm[0], 3.0),
        made_up(ddpm[1], 2.0),
    ]
    assert set(verdict_of(results).harmful) == {ddim[1]}
    inside = SweepSetting("ddpm", 10, 1.0, 0.1, 0.8)  # whose none is that of the whole run
    assert set(verdict_of([*results, made_up(inside, 4.0)]).harmful) == {ddim[1], inside}


def test_the_same_harm_of_several_steps_is_one_warning() -> None:
    some = sweep_grid([1, 5], ["ddim"], [10, 25])
    found = verdict_of([made_up(point, 1.0 + point.guidance_scale) for point in some])
    assert found.warnings == (
        "ddim, 10 and 25 steps: guidance at every scale is worse than no guidance; at 5 with 10 "
        "steps Frechet distance 6 (5.9 to 6.1) against 1 (0.9 to 1.1).",
    )
    assert found.best.guidance_scale == 0 and "Images without guidance are closest" in " ".join(
        found.findings
    )


def test_the_sharpest_is_within_the_interval_of_the_best() -> None:
    some = sweep_grid([1, 3, 8], ["ddim"], [10])
    distances, accuracies = (
        (0.5, 0.45, 0.54, 0.56),
        (0.6, 0.7, 0.8, 0.9),
    )  # the best's interval is 0.35 to 0.55
    found = verdict_of([made_up(*one) for one in zip(some, distances, accuracies, strict=True)])
    assert (found.best, found.most_accurate) == (some[1], some[2])
    found = verdict_of(
        [made_up(point, d, None) for point, d in zip(some, distances, strict=True)]
    )  # without a judge
    assert found.best == found.most_accurate == some[1] and "accura" not in str(found)
    with pytest.raises(ValueError, match="no setting is measured"):
        verdict_of([])


@pytest.mark.parametrize("seed", range(5))
def test_the_front_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    some = sweep_grid([1, 2, 3], ["ddim", "ddpm"], [5, 10, 20], [(0, 1), (0, 0.5)])
    values = rng.integers(1, 6, (len(some), 2)) / 8  # with ties
    results = [made_up(point, *value) for point, value in zip(some, values, strict=True)]
    expected = set()
    for a in results:
        better = False
        for b in results:
            pairs = [
                (b.value("frechet_distance"), a.value("frechet_distance")),
                (a.value("top_1"), b.value("top_1")),
                (b.cost["seconds"], a.cost["seconds"]),
            ]
            better |= all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)
        expected |= set() if better else {a.setting}
    front = pareto_front(results)
    assert {one.setting for one in front} == expected and 0 < len(expected) < len(some)
    seconds = [one.cost["seconds"] for one in front]
    assert seconds == sorted(seconds)


def test_the_clocks_noise_puts_nothing_on_the_front() -> None:
    some = [SweepSetting("ddim", 10, scale) for scale in (1.0, 2.0, 3.0)]
    results = [
        made_up(point, distance, 0.5, seconds)
        for point, distance, seconds in zip(some, (1.0, 2.0, 3.0), (1.01, 1.0, 0.99), strict=True)
    ]
    assert [one.setting for one in pareto_front(results)] == some[:1]


# the report


class References(HTMLParser):
    """What a page refers to, its text, and the tags that are open at its end."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.text, self.open = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found += [
            value or ""
            for name, value in attrs
            if name in ("src", "srcset", "href", "data", "action")
        ]
        if tag not in ("meta", "link", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of made-up points, with names that are markup."""
    folder = tmp_path_factory.mktemp("report")
    results = []
    for i, point in enumerate(
        sweep_grid([1, 5], ["ddim", "dpmsolver++"], [5, 10], [(0, 1), (0.2, 0.8)])
    ):
        pixels = np.repeat(10 * i + np.arange(10, dtype=np.uint8)[None], 8, 0).repeat(
            8, 1
        )  # ten images in a row
        (folder / "points").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "points" / f"{point.name}.png")
        results.append(
            made_up(point, 1 + point.guidance_scale / 4, 0.5, pictures=f"{point.name}.png")
        )
    write_report(
        folder,
        results,
        SETTINGS | {"model": "<script>alert(1)</script>"},
        5.0,
        [f"<b>{i}" for i in range(10)],
    )
    return folder


def test_the_page_needs_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = References(text)
    assert len(page.found) == 1 + 3 + 8 * 3 and not page.open  # an icon, plots, a strip a row
    assert all(one.startswith("data:") for one in page.found)
    assert not re.search(
        r"https?:|//\w|@import|url\(|<link(?! rel=\"icon\")", re.sub(r"data:[^\"]*", "", text)
    )
    assert (
        "<script>alert" not in text
        and "<script>alert(1)</script>" in page.text
        and "<b>3" in page.text
    )
    assert (
        "Guidance can be worse than no guidance" in page.text
        and "default scale, 5, is worse than no guidance in 8 of 8" in page.text
    )
    explained = re.findall("<dt>(.*?)</dt>", text)
    assert explained == [*(metric.title for metric in METRICS.values()), "cost"]
    assert page.text.count("scale 5") >= 8 and "guided from 0.2 to 0.8" in page.text


def test_the_markdown_refers_to_pictures_that_are_there(report: Path) -> None:
    text = (report / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(pictures) == 4 and all(Image.open(report / one).width > 300 for one in pictures)
    assert "Warning: guidance can be worse than no guidance" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[:10]}) == 1 and len(rows) == 2 + 8 + 2 + 20
    content = json.loads((report / "sweep.json").read_text())
    assert len(content["points"]) == 20 and content["verdict"]["best"]["guidance_scale"] == 0


def test_the_markdown_shows_names_as_they_are(report: Path, tmp_path: Path) -> None:
    assert "of \\<script\\>alert(1)\\</script\\>\n" in (report / "report.md").read_text()
    name = "a|b`c`[d](http://e)<i>\n# f\x1b\u202e \udcff コート"
    settings = SETTINGS | {"model": name, "reference": SETTINGS["reference"] | {"name": name}}
    point = sweep_grid([1], ["ddim"], [5])[0]
    write_report(tmp_path, [made_up(point, 1)], settings, 1.0, [name])
    text = (tmp_path / "report.md").read_text()
    assert r"Measured guidance of a\|b\`c\`\[d\](http\://e)\<i\>\\n\# f\\x1b\\u202e" in text
    assert "コート" in text and not re.search(r"(?m)^# f|(?<!\\)\[d|\x1b|\u202e", text)
    assert (tmp_path / "report.html").read_text().count("コート") >= 3


def test_a_grid_has_a_row_a_scale_at_equal_seeds(report: Path) -> None:
    grid = np.asarray(Image.open(report / "images-ddim-5-steps-from-0.2-to-0.8.png").convert("L"))
    height = grid.shape[0] // 3
    rows = [
        [int(grid[height // 2 + row * height, -5 - height * i]) for i in range(3)]
        for row in range(3)
    ]
    assert rows == [[9, 8, 7], [39, 38, 37], [49, 48, 47]]  # points 0, 3 and 4


def test_no_warning_where_there_is_none(tmp_path: Path) -> None:
    some = sweep_grid([1], ["ddim"], [5])
    write_report(
        tmp_path, [made_up(point, 2 - point.guidance_scale) for point in some], SETTINGS, 1.0
    )
    text = (tmp_path / "report.html").read_text()
    assert "Guidance does no harm here" in text and "can be worse than no guidance" not in text
    assert "Warning" not in (tmp_path / "report.md").read_text()


# the whole, with small networks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, i in itertools.product(NAMES.values(), range(10)):
        path = folder / "test" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a judge beside it, which never guided."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = quiet(
        small_unet(num_class_embeds=4),
        DDIMScheduler(clip_sample=False),
        small_classifier(),
        defaults={"num_inference_steps": 2, "guidance_scale": 3.0},
    )
    pipeline.save_pretrained(folder)
    judge = small_classifier(id2label=NAMES)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.mul_(1.5)
    judge.save_pretrained(folder / "judge")
    return folder


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "sweep",
        "--model",
        str(model),
        "--reference",
        str(data),
        "--features",
        str(model / "judge"),
        "--scales",
        "2",
        "--num-images",
        "12",
        "--batch-size",
        "5",
        "--device",
        "cpu",
        "--bootstrap",
        "10",
        "--quiet",
        "--output",
        str(output),
        *more,
    ]


@pytest.fixture(scope="module")
def swept(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    main(
        arguments(
            model,
            data,
            folder,
            "--schedulers",
            "ddim",
            "dpmsolver++",
            "--steps",
            "2",
            "4",
            "--intervals",
            "0:1",
            "0:0.5",
        )
    )
    return folder


def test_real_images_of_another_white(model: Path, data: Path, tmp_path: Path) -> None:
    """Those of 12 bits in 16 are the images of 8 bits by --image-range, and refused without."""
    for path in data.glob("**/*.png"):
        deep = (np.asarray(Image.open(path)) / 255 * 4095).round().astype(np.uint16)
        copy = tmp_path / "deep" / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(deep).save(copy)
    with pytest.raises(SystemExit, match="--image_range LOW,HIGH"):
        main(arguments(model, tmp_path / "deep", tmp_path / "out"))
    distances = []
    for place, more in ((data, ()), (tmp_path / "deep", ("--image-range", "0,4095"))):
        main(arguments(model, place, tmp_path / f"of-{place.name}", "--judge", "none", *more))
        point = tmp_path / f"of-{place.name}" / "points" / "ddim-2-steps-scale-2.json"
        figures = json.loads(point.read_text())["figures"]
        distances.append(figures["frechet_distance"]["value"])
    assert distances[1] == pytest.approx(distances[0], rel=0.02)


def test_a_sweep_makes_points_curves_and_reports(swept: Path) -> None:
    names = {path.name for path in swept.iterdir()}
    assert {
        "report.html",
        "report.md",
        "sweep.json",
        "quality-diversity.png",
        "quality-cost.png",
        "by-scale.png",
        "points",
    } <= names and not [name for name in names if name.endswith(".partial")]
    found = {path.stem: json.loads(path.read_text()) for path in (swept / "points").glob("*.json")}
    assert len(found) == 2 * 2 * 3
    for one in found.values():
        steps, point = one["point"]["num_inference_steps"], one["point"]
        assert one["cost"]["network_evaluations"] == steps and one["cost"]["seconds"] > 0
        share = point["guidance_stop"] if point["guidance_scale"] else 0
        assert one["cost"]["classifier_evaluations"] == steps * share
        assert {
            "frechet_distance",
            "kernel_distance",
            "sliced_wasserstein",
            "precision",
            "recall",
            "density",
            "coverage",
            "top_1",
            "relative_diversity",
            "class_score",
        } <= one["figures"].keys()
        assert one["figures"]["top_1"]["interval"] and len(one["per_class"]) == 3
    strip = Image.open(swept / "points" / "ddim-2-steps-scale-2.png")
    assert strip.size == (80, 8) and strip.mode == "L"
    assert "default scale, 3, was not measured" in (swept / "report.md").read_text()
    assert all(
        one.startswith("data:") for one in References((swept / "report.html").read_text()).found
    )


def test_figures_are_those_of_the_same_images_in_a_folder(
    swept: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    """Sampled by `sample`, evaluated by `evaluate`."""
    pipeline, judge = ClassifierGuidedPipeline.from_pretrained(model), load_network(model / "judge")
    sample_to_folder(
        pipeline,
        [0, 1, 2],
        tmp_path,
        12,
        batch_size=5,
        shard_size=20,
        progress=False,
        guidance_scale=2.0,
        num_inference_steps=4,
        guidance_stop=0.5,
        format="parquet",
    )
    images = open_generated(tmp_path)
    expected = evaluate(
        images,
        open_real(str(data), images.shape),
        judge,
        judge,
        bootstrap=10,
        batch_size=5,  # as the sweep's, for the same rounding
        progress=False,
    )
    found = json.loads((swept / "points" / "ddim-4-steps-scale-2-from-0-to-0.5.json").read_text())
    assert found["figures"].keys() == expected.metrics.keys()
    for name, figure in expected.metrics.items():
        assert found["figures"][name]["value"] == pytest.approx(
            figure["value"], rel=1e-6, abs=1e-9
        ), name
        assert found["figures"][name]["interval"] == pytest.approx(
            figure["interval"], rel=1e-6, abs=1e-9
        ), name


def test_started_again_it_measures_what_is_missing(swept: Path, model: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept / "points").iterdir()}
    main(arguments(model, data, swept, "--scales", "2", "3", "--steps", "2"))  # one of three is new
    new = {path.name for path in (swept / "points").iterdir()} - {path.name for path in before}
    assert new == {"ddim-2-steps-scale-3.json", "ddim-2-steps-scale-3.png"}
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert "ddim, 4 steps" in (swept / "report.md").read_text()  # what was there is in the report
    for more, was in (
        (["--num-images", "13"], "num_images was 12, is 13"),
        (["--batch-size", "4"], "batch_size was 5, is 4"),
    ):
        with pytest.raises(SystemExit, match=f"other settings .{was}"):
            main(arguments(model, data, swept, *more))


def test_a_killed_sweep_goes_on(swept: Path, model: Path, data: Path, tmp_path: Path) -> None:
    """By SIGKILL, when its first point is there."""
    given = arguments(model, data, tmp_path, "--schedulers", "ddim", "--steps", "2", "4")
    run = subprocess.Popen(
        [sys.executable, "-m", "guided_diffusers", *given],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        until = time.monotonic() + 300
        while (
            not list(tmp_path.glob("points/[!.]*.json"))
            and run.poll() is None
            and time.monotonic() < until
        ):
            time.sleep(0.01)
    finally:
        run.kill()
        run.wait(60)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("points/[!.]*.json")}
    assert there
    main(given)
    assert all(path.stat().st_mtime_ns == then for path, then in there.items())
    made = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("points/[!.]*.json")}
    assert len(made) == 4
    for name, one in made.items():  # as without the kill, whatever the process
        expected = json.loads((swept / "points" / name).read_text())
        for figure, value in expected["figures"].items():
            assert one["figures"][figure]["value"] == pytest.approx(
                value["value"], rel=1e-5, abs=1e-9
            ), (name, figure)


def test_a_full_disk_loses_no_point(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, given = os.replace, arguments(model, data, tmp_path, "--steps", "2")

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "ddim-2-steps-scale-2.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        SystemExit, match="ddim-2-steps-scale-2.json can't be written: No space left"
    ):
        main(given)
    assert [path.name for path in (tmp_path / "points").glob("*.json")] == [
        "ddim-2-steps-scale-0.json"
    ]
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    main(given)
    assert (
        len(list((tmp_path / "points").glob("*.json"))) == 2 and (tmp_path / "report.html").exists()
    )


def test_arguments_have_an_effect(swept: Path, model: Path, data: Path, tmp_path: Path) -> None:
    def figures(folder: Path, name: str = "ddim-2-steps-scale-2") -> dict[str, Any]:
        return json.loads((folder / "points" / f"{name}.json").read_text())["figures"]

    plain = figures(swept)
    for name, more in {
        "seed": ["--seed", "1", "--judge", "none"],
        "told": ["--no-conditional"],
        "dtype": ["--dtype", "bfloat16"],
    }.items():
        main(arguments(model, data, tmp_path / name, *more))
        assert (
            figures(tmp_path / name)["frechet_distance"]["value"]
            != plain["frechet_distance"]["value"]
        ), name
    assert "top_1" in figures(tmp_path / "told") and "top_1" not in figures(tmp_path / "seed")
    assert "judge: none" in (tmp_path / "seed" / "report.md").read_text()
    settings = json.loads(
        (tmp_path / "dtype" / "points" / "ddim-2-steps-scale-2.json").read_text()
    )["settings"]
    assert settings["dtype"] == "bfloat16" and settings["weights"].startswith("sha256:")
    assert settings["device"] == "cpu" and settings["batch_size"] == 5
    main(
        arguments(
            model,
            data,
            tmp_path / "how",
            "--algorithms",
            "output",
            "strang",
            "--every",
            "1",
            "2",
            "--tolerances",
            "0.1",
        )
    )
    found = {
        path.stem: json.loads(path.read_text())
        for path in (tmp_path / "how" / "points").glob("*scale-2-*.json")
    }
    assert len(found) == 6
    asked = {name: one["cost"]["classifier_evaluations"] for name, one in found.items()}
    assert [asked[f"ddim-2-steps-scale-2-strang-every-{k}"] for k in (1, 2)] == [2, 1]


def test_a_sweep_warns_once(
    model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"clip_sample": false', '"clip_sample": true'))
    main(arguments(tmp_path / "model", data, tmp_path / "out", "--scales", "2", "3"))
    assert caplog.text.count("DDIMScheduler clips x0") == 1


def test_what_is_wrong_is_said(model: Path, data: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 20 * i).save(unlabelled / f"{i}.png")
    few = tmp_path / "few"
    for name, i in itertools.product(list(NAMES.values())[:2], range(2)):
        (few / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(few / name / f"{i}.png")
    other = small_classifier(id2label={0: "cat", 1: "dog", 2: "crow"})
    next(other.parameters()).data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for more, message in (
        (["--schedulers", "nonsense"], "scheduler 'nonsense' is unknown"),
        (["--scales", "nan"], "--scales nan: a finite number is allowed"),
        (["--num-images", "3"], "num_images=3: at least"),
        (["--max-features", "5"], "max_features=5: at least 6"),
        (["--reference", str(few)], "has 4 images; at least 6"),
        (["--reference", str(unlabelled)], "has no labels"),
        (["--judge", str(tmp_path / "other")], "which the judge"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main(arguments(model, data, tmp_path / "out", *more))
        assert not list(tmp_path.glob("out/points/*"))
    for option in ("--features", "--judge"):  # that of --features is the judge, too
        with pytest.raises(
            SystemExit,
            match="judge: .*classifier has the weights of the pipeline's classifier and would",
        ):
            main(arguments(model, data, tmp_path / "out", option, str(model / "classifier")))
    with pytest.raises(
        SystemExit,
        match="features: .*classifier has the weights of the pipeline's classifier and would",
    ):
        main(
            arguments(
                model,
                data,
                tmp_path / "out",
                "--features",
                str(model / "classifier"),
                "--judge",
                "none",
            )
        )
    assert not list(tmp_path.glob("out/points/*"))
    with pytest.raises(ValueError, match="pipeline: it has no classifier"):
        judge = load_network(model / "judge")
        sweep(
            quiet(small_unet(), DDIMScheduler(), id2label=NAMES),
            str(data),
            tmp_path / "out",
            judge,
            judge,
        )


def test_a_network_in_lower_precision_leaves_sampler_and_classifier_as_they_are() -> None:
    unet, classifier, seen = small_unet(num_class_embeds=4), small_classifier(), []
    pipeline = quiet(unet, DDIMScheduler(clip_sample=False), classifier)
    forward = unet.forward
    handles = [
        unet.conv_in.register_forward_hook(lambda *given: seen.append(("within", given[2].dtype))),
        unet.register_forward_hook(lambda *given: seen.append(("network", given[2][0].dtype))),
        classifier.register_forward_hook(
            lambda *given: seen.append(("classifier", given[2].logits.dtype))
        ),
    ]

    def image() -> torch.Tensor:
        return pipeline(
            "dog",
            guidance_scale=3.0,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    full = image()
    seen.clear()
    with computing_in(unet, torch.bfloat16):
        lower = image()
    assert set(seen) == {
        ("within", torch.bfloat16),
        ("network", torch.float32),
        ("classifier", torch.float32),
    }
    assert lower.dtype == torch.float32 and 0 < (lower - full).abs().max() < 0.1 * full.abs().max()
    assert unet.forward == forward and "forward" not in vars(unet) and torch.equal(image(), full)
    for handle in handles:
        handle.remove()


def test_without_intervals_a_sweep_guides_where_the_pipeline_does(
    model: Path, data: Path, tmp_path: Path
) -> None:
    pipeline, judge = (
        ClassifierGuidedPipeline.from_pretrained(model),
        load_network(str(model / "judge")),
    )
    pipeline.register_to_config(defaults={**pipeline.config.defaults, "guidance_start": 0.5})
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config
    )  # infinity in its config
    for intervals in (None, [(0.0, 1.0)]):
        sweep(
            pipeline,
            str(data),
            tmp_path,
            judge,
            judge,
            scales=[2],
            intervals=intervals,
            num_images=12,
            bootstrap=10,
            progress=False,
        )
    found = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert {
        one["point"]["guidance_start"]: one["cost"]["classifier_evaluations"]
        for one in found
        if one["point"]["guidance_scale"]
    } == {0.5: 1, 0.0: 2}
    with pytest.raises(ValueError, match="intervals="):
        sweep(pipeline, str(data), tmp_path, judge, judge, scales=[2], intervals=[], progress=False)


def test_what_quality_costs_and_the_preset_that_follows(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """examples/benchmarks/quality_cost.py on a small model; started again, it measures nothing and says the same."""

    def run(*parts: str) -> dict:
        more = [one for part in parts for one in ("--part", part)]
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "quality_cost",
                "--reference",
                str(data),
                "--model",
                str(model),
                "--judge",
                str(model / "judge"),
                "--num-images",
                "12",
                "--solver-images",
                "10",
                "--preset-images",
                "12",
                "--steps",
                "4",
                "--solver-steps",
                "2",
                "--preset-steps",
                "4",
                "--preset-scales",
                "1",
                "--preset-starts",
                "0",
                "0.5",
                "--output",
                str(tmp_path),
                "--dtype",
                "float32",
                "--quiet",
                *more,
            ],
        )
        runpy.run_path(
            str(Path(__file__).parents[1] / "examples/benchmarks/quality_cost.py"),
            run_name="__main__",
        )
        return json.loads((tmp_path / "quality_cost.json").read_text())

    parts = ("quality", "solvers", "directions", "preset")
    figures = run(*parts)
    unguided, plain, *spared, published = figures["quality"]
    assert (
        published["kind"] == "published"
        and published["equal_quality"]
        and published["seconds_of_published"] == 1
    )
    assert published["network_evaluations"] == published["classifier_evaluations"] == 250
    assert plain["surcharge_of_plain"] == pytest.approx(1) and plain["classifier_evaluations"] == 4
    assert len(spared) == 2 and all(row["classifier_evaluations"] < 4 for row in spared)
    assert {row["algorithm"] for row in figures["solvers"]} == {"output", "lie_trotter", "strang"}
    assert all(
        row["diverged"] == (row["frechet_distance"] > row["unguided"]) for row in figures["solvers"]
    )
    by_direction = {}
    for row in figures["directions"]:
        by_direction.setdefault(row["direction"], []).append(row["frechet_distance"])
    as_it_is = by_direction.pop("as it is")
    assert len(by_direction) == 4 and all(
        values != as_it_is for name, values in by_direction.items() if name != "capped at the score"
    )  # which is no shorter here

    first, at_once, *others = figures["preset"]
    harmless = [
        row
        for row in others
        if row["frechet_distance"] <= first["frechet_distance_interval"][1]
        and row["recall"] >= first["recall_interval"][0]
    ]
    preset = json.loads((tmp_path / "preset.json").read_text())
    best = max(harmless, key=lambda row: row["top_1"])
    assert preset["scheduler"] == "dpmsolver++" and preset["command"].endswith("--part preset")
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, **preset["defaults"]}
    assert str(SweepSetting(preset["scheduler"], **call)) == best["setting"]
    assert [row["agreement"] for row in preset["rows"]] == [
        row["top_1"] for row in (first, at_once, best)
    ]
    assert (tmp_path / "quality_cost.png").exists()
    monkeypatch.setattr("guided_diffusers.sweep.measure.sample", None)  # nothing is sampled again
    assert run(*parts) == run("quality") == figures  # the other parts stay


# learned schedules


def test_nelder_mead_finds_the_lowest_point_of_a_narrow_valley(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(1 - x)^2 + 100 (y - x^2)^2 is 0 at (1, 1); each evaluation is counted."""
    calls: list[list[float]] = []

    def rosenbrock(point: Any) -> float:
        calls.append(list(point))
        x, y = point
        return (1 - x) ** 2 + 100 * (y - x * x) ** 2

    for count in (3, 4, 5, 10, 200):
        calls.clear()
        nelder_mead(rosenbrock, [-1.0, 2.0], 0.5, count)
        assert len(calls) == count and calls[:3] == [[-1, 2], [-0.5, 2], [-1, 2.5]]
    assert min(list(calls), key=rosenbrock) == pytest.approx([1, 1], abs=1e-3)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ImportError, match=r"learn needs SciPy: pip install 'guided-diffusers\[learn\]'"
    ):
        _check_learn(1, 3)


def test_labelled_features_tell_images_of_another_label() -> None:
    """Two classes at -1 and 1 in one feature: with exchanged labels the images are the same set, and
    with their labels each is off by (0, r, -r), or there is a cheaper transport."""
    labels = torch.tensor([0, 1] * 20)
    x = (2.0 * labels - 1)[:, None] + 0.01 * torch.randn(
        40, 1, generator=torch.Generator().manual_seed(0)
    )
    right, wrong = (
        SimpleNamespace(sample=SimpleNamespace(features=x, labels=ids))
        for ids in (labels, 1 - labels)
    )
    real = labelled_features(right, right, 2)
    radius = float((x - x.mean(0)).square().mean().sqrt())
    one_hot = torch.nn.functional.one_hot(labels, 2).double()
    assert torch.allclose(real[:, 1:], radius * one_hot, rtol=1e-5)
    assert torch.equal(labelled_features(right, right, 0), x.double())
    exchanged = labelled_features(wrong, right, 2)
    assert sliced_wasserstein(real[:, :1], exchanged[:, :1]) < 1e-10
    assert 0.1 < float(sliced_wasserstein(real, exchanged)) <= 3 * 2 * radius**2 + 1e-6


def test_knots_are_levels_of_the_run() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(timestep_spacing="trailing"), small_classifier())
    with pytest.raises(ValueError, match="learn=9: ddim with 5 steps has 5 noise levels"):
        knot_levels(pipeline, "ddim", 5, 9)
    levels = knot_levels(pipeline, "ddim", 5, 5)
    alphas = DDIMScheduler().alphas_cumprod[[199, 399, 599, 799, 999]].double()
    assert levels == pytest.approx(((1 - alphas) / alphas).sqrt().tolist(), rel=1e-4)
    assert knot_levels(pipeline, "ddim", 5, 3) == levels[::2]
    assert knot_levels(pipeline, "ddim", 5, 1) == levels[:1]


def test_a_schedule_is_learned_measured_and_resumed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    learn = ("--steps", "3", "--learn", "2", "--evaluations", "6", "--seed", "4")
    main(arguments(model, data, tmp_path / "out", *learn))
    path = tmp_path / "out" / "learned" / "ddim-3-steps.json"
    content = json.loads(path.read_text())
    rows = content["evaluations"]
    assert content["protocol"]["seed"] == 5 and 4 <= len(rows) <= 6  # equal points count once
    assert rows[0]["scales"] == [3.0, 3.0] and rows[1]["scales"] == [6.0, 3.0]
    best = min(rows, key=lambda row: row["distance"])["scales"]
    (point,) = (
        json.loads(file.read_text())
        for file in (tmp_path / "out" / "points").glob("*schedule*.json")
    )
    schedule = {"sigmas": content["protocol"]["sigmas"], "scales": best}
    assert point["point"]["guidance_schedule"] == [
        list(k) for k in zip(*schedule.values(), strict=True)
    ]
    assert point["settings"]["seed"] == 4 and point["figures"]["sliced_wasserstein"]["interval"]
    preset = json.loads((path.parent / "ddim-3-steps-preset.json").read_text())
    assert (preset["mode"], preset["scheduler"]) == ("label", "ddim")
    assert preset["defaults"] == {"num_inference_steps": 3, "guidance_schedule": schedule}
    assert [row["guidance"] for row in preset["rows"]] == ["no guidance", "learned schedule"]

    # the preset's images, from a saved pipeline, are those that were measured
    pipeline = ClassifierGuidedPipeline.from_pretrained(model)
    pipeline.register_to_config(defaults=preset["defaults"])
    assert pipeline(0, output_type="pt").settings["guidance_schedule"] == schedule
    pipeline.save_pretrained(tmp_path / "saved")
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    ((_, images),) = sample(pipeline, range(3), 4, 50, range(10), output_type="pt")
    strip = Image.open(tmp_path / "out" / "points" / point["pictures"])
    pixels = torch.cat(list((images.float() * 255).round()), dim=2)[0].to(torch.uint8)
    assert torch.equal(torch.from_numpy(np.asarray(strip).copy()), pixels)

    # killed after three evaluations, it ends the same
    content["evaluations"] = rows[:3]
    path.write_text(json.dumps(content))
    main(arguments(model, data, tmp_path / "out", *learn))
    assert json.loads(path.read_text())["evaluations"] == rows
    with pytest.raises(SystemExit, match="ddim-3-steps.json has distances under other settings"):
        main(arguments(model, data, tmp_path / "out", *learn[:-2], "--seed", "4", "--learn", "3"))
    with pytest.raises(SystemExit, match=r"evaluations=3: at least learn \+ 2 = 4 is allowed"):
        main(arguments(model, data, tmp_path / "new", *learn, "--evaluations", "3"))


def test_a_schedule_is_learned_again_for_a_scheduler_with_an_infinite_setting(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """`lambda_min_clipped` of DPM-Solver++ is -inf, which JSON doesn't have."""
    shutil.copytree(model, tmp_path / "model")
    pipeline = ClassifierGuidedPipeline.from_pretrained(model)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    learn = ("--steps", "3", "--learn", "1", "--evaluations", "3")
    for _ in range(2):
        main(arguments(tmp_path / "model", data, tmp_path / "out", *learn))
    assert (tmp_path / "out/learned/dpmsolver++-3-steps-preset.json").is_file()
