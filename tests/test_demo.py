"""The demo: its calls and their code, its page in a real browser, and the Space that it becomes."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import SpaceCard
from PIL import Image

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.demo import (
    DemoModel,
    EditForm,
    SampleForm,
    demo_app,
    edit_picture,
    sample_pictures,
    write_space,
)
from guided_diffusers.demo.app import _preset
from guided_diffusers.demo.pictures import fitting
from guided_diffusers.demo.server import is_loopback, start
from guided_diffusers.sampling import grid, image_generator

ROOT = Path(__file__).parents[1]
SNEAKER, BOOT = 7, 9
FEW = {"steps": 3, "num_images": 2}


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return DemoModel.load("fashion-mnist", device="cpu")


def run_code(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names after the code was executed in a folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "demo", "exec"), names)  # noqa: S102
    return names


# ---------------------------------------------------------------- calls and their code


@pytest.mark.parametrize(
    "form",
    [
        SampleForm(labels=[SNEAKER], **FEW),
        SampleForm(
            labels=[SNEAKER], scale=2.5, start=0.1, stop=0.8, conditional=True, seed=3, **FEW
        ),
        SampleForm(labels=[SNEAKER, BOOT], weights="1, -0.5", scheduler="ddpm", **FEW),
        SampleForm(labels=[SNEAKER], scale=1.0, power=3, start=0.0, **FEW),
        SampleForm(labels=[SNEAKER], conditional=True, scale=0, classifier_free_scale=1.5, **FEW),
        SampleForm(caption="this is a bootie", caption_scale=4, stop=0.9, scheduler="ddim", **FEW),
        SampleForm(labels=[BOOT], caption="a grey boot", **FEW),
    ],
    ids=["preset", "interval", "mixture", "power", "classifier-free", "caption", "both"],
)
def test_the_code_makes_the_same_images_bit_for_bit(
    form: SampleForm, model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sample_pictures(model, form)
    names = run_code(result.code, tmp_path, monkeypatch)
    assert grid(names["images"]).tobytes() == result.guided.tobytes()
    with Image.open("picture.png") as picture:
        assert picture.tobytes() == result.guided.tobytes()
    assert result.guided.tobytes() != result.unguided.tobytes()
    assert (
        result.record.images == 2
        and f"{len(result.images)} images, guidance evaluated" in result.summary
    )


def test_a_form_is_the_call_that_it_says(model: DemoModel) -> None:
    """Guided and unguided images are those of the pipeline, and of `sample` with the same seed."""
    form = SampleForm(labels=[SNEAKER], scale=3.0, start=0.2, stop=1.0, seed=5, **FEW)
    result = sample_pictures(model, form)
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")

    def images(**call: Any) -> list[Image.Image]:
        generators = [image_generator(5, i) for i in range(2)]
        call |= {"num_inference_steps": 3, "conditional": False, "generator": generators}
        return pipeline("sneaker", 2, **call).images

    guided = images(guidance_scale=3.0, guidance_start=0.2, guidance_stop=1.0)
    assert result.guided.tobytes() == grid(guided).tobytes()
    assert result.unguided.tobytes() == grid(images(guidance_scale=0)).tobytes()


def test_each_field_changes_the_images(model: DemoModel) -> None:
    base = {"labels": [SNEAKER], "scale": 3.0, "start": 0.0, "stop": 1.0, **FEW}
    changes = [
        {},
        {"labels": [BOOT]},
        {"labels": [SNEAKER, BOOT]},
        {"labels": [SNEAKER, BOOT], "weights": "1 3"},
        {"weights": "2"},
        {"scale": 1.0},
        {"power": 2},
        {"start": 0.5},
        {"stop": 0.5},
        {"conditional": True},
        {"conditional": True, "classifier_free_scale": 1.0},
        {"caption": "a boot"},
        {"caption": "a boot", "caption_scale": 1.0},
        {"steps": 4},
        {"scheduler": "euler"},
        {"seed": 1},
        {"num_images": 3},
    ]
    results = [sample_pictures(model, SampleForm(**(base | change))) for change in changes]
    assert len({result.guided.tobytes() for result in results}) == len(changes)


def test_every_scheduler_of_the_list_makes_images(model: DemoModel) -> None:
    assert len(model.schedulers) == len(set(model.schedulers)) >= 6
    for name in model.schedulers:
        result = sample_pictures(model, SampleForm(labels=[SNEAKER], scheduler=name, **FEW))
        assert np.asarray(result.guided).std() > 10, name
    assert type(model.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_progress_counts_the_steps_of_both_runs(model: DemoModel) -> None:
    seen: list[tuple[int, int]] = []
    sample_pictures(model, SampleForm(labels=[SNEAKER], **FEW), lambda *made: seen.append(made))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, r"labels: none is chosen; a label, or a caption, is needed"),
        ({"weights": "1, 2"}, r"weights='1, 2': 1 numbers?, one for each label"),
        ({"weights": "much"}, r"weights='much'"),
        ({"seed": -1}, r"seed=-1: an integer from 0 to"),
        ({"seed": None}, r"seed=None: an integer from 0 to"),
        ({"num_images": 0}, r"number of images=0: an integer from 1 to 64"),
        ({"num_images": 65}, r"number of images=65"),
        ({"steps": 0}, r"steps=0: an integer from 1"),
        ({"start": 0.8, "stop": 0.2}, r"guidance_start"),
        ({"power": 9}, r"guidance_power=9"),
        ({"scale": float("nan")}, r"guidance_scale"),
        ({"labels": [], "caption": "a zebra"}, r"not trained on the words \['zebra'\]"),
        ({"scheduler": "nothing"}, r"scheduler 'nothing' is unknown"),
    ],
)
def test_a_wrong_field_is_named(change: dict, message: str, model: DemoModel) -> None:
    with pytest.raises(ValueError, match=message):
        sample_pictures(model, SampleForm(**({"labels": [SNEAKER], **FEW} | change)))


@pytest.mark.parametrize("size", [(28, 28), (50, 40)], ids=["the model's size", "another size"])
def test_the_code_of_an_edit_makes_the_same_picture(
    size: tuple[int, int], model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = sample_pictures(model, SampleForm(labels=[SNEAKER], **FEW)).images[0]
    picture = picture.resize(size)
    picture.save(tmp_path / "picture.png")
    form = EditForm(picture, BOOT, SNEAKER, strength=0.7, scale=4.0, steps=5)
    result = edit_picture(model, form)
    names = run_code(result.code, tmp_path, monkeypatch)
    assert names["result"].images[0].tobytes() == result.image.tobytes()
    assert result.image.size == (28, 28) and result.comparison.width > 3 * 28


def test_each_field_changes_the_edit(model: DemoModel) -> None:
    form = SampleForm(labels=[SNEAKER], steps=8, num_images=1)
    (picture,) = sample_pictures(model, form).images
    base = {"picture": picture, "label": BOOT, "source_label": SNEAKER, "steps": 6}
    changes = [
        {},
        {"label": 8},
        {"source_label": 8},
        {"strength": 0.3},
        {"scale": 30},
        {"steps": 7},
    ]
    edits = [edit_picture(model, EditForm(**(base | change))).image for change in changes]
    assert len({edit.tobytes() for edit in edits}) == len(changes)


def test_a_wrong_edit_is_named(model: DemoModel) -> None:
    picture = Image.new("L", (28, 28), 100)
    with pytest.raises(ValueError, match="picture: none is there"):
        edit_picture(model, EditForm(None, BOOT))
    with pytest.raises(ValueError, match="label: none is chosen"):
        edit_picture(model, EditForm(picture, None))
    with pytest.raises(ValueError, match="strength=2"):
        edit_picture(model, EditForm(picture, BOOT, strength=2))
    with pytest.raises(ValueError, match="parts of it are transparent"):
        edit_picture(model, EditForm(Image.new("RGBA", (28, 28), (9, 9, 9, 0)), BOOT))
    opaque = Image.new("RGBA", (28, 28), (100, 100, 100, 255))
    assert edit_picture(model, EditForm(opaque, BOOT, steps=2)).image.size == (28, 28)


def tiny_unet(**config: Any) -> UNet2DModel:
    blocks = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    types = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(
        **({"sample_size": 8, "in_channels": 1, "out_channels": 1} | config), **blocks, **types
    )


def tiny_classifier() -> NoiseAwareClassifier:
    return NoiseAwareClassifier(
        8,
        1,
        num_labels=3,
        block_out_channels=(8,),
        down_block_types=("ResnetDownsampleBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        pool="adaptive",
        id2label={0: "a", 1: "a", 2: "<b>"},
    )


def test_a_form_offers_what_the_model_has() -> None:
    unconditional = DemoModel("x", ClassifierGuidedPipeline(tiny_unet(), DDPMScheduler()))
    assert not (unconditional.labels or unconditional.can_edit)
    result = sample_pictures(unconditional, SampleForm(**FEW))
    assert result.guided.tobytes() == result.unguided.tobytes() and result.record is None
    with pytest.raises(ValueError, match="caption='boot': the model has no CLIP"):
        sample_pictures(unconditional, SampleForm(caption="boot", **FEW))

    pipeline = ClassifierGuidedPipeline(tiny_unet(), DDPMScheduler(), tiny_classifier())
    guided = DemoModel("x", pipeline)
    assert guided.labels == [("a", 0), ("a", 1), ("<b>", 2)]
    assert [guided.label(i) for i in range(3)] == [0, 1, "<b>"]
    assert guided.can_edit and not guided.can_hide_label
    assert guided.max_power is None and guided.picture_size == (8, 8)
    assert "\n    1,\n" in sample_pictures(guided, SampleForm(labels=[1], **FEW)).code


def test_labels_of_a_model_without_a_classifier_are_the_networks() -> None:
    torch.manual_seed(0)
    names = {0: "a", 1: "b", 2: "c"}
    network = tiny_unet(num_class_embeds=4)  # the last one is the null label
    pipeline = ClassifierGuidedPipeline(network, DDPMScheduler(), id2label=names)
    model = DemoModel("x", pipeline)
    assert model.has_null_label and not model.can_hide_label
    shown = [sample_pictures(model, SampleForm(labels=[i], **FEW)).guided for i in (0, 1)]
    assert shown[0].tobytes() != shown[1].tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"picture: a picture of mode {mode}; 8 bits"):
        fitting(DemoModel.load(), Image.new(mode, (50, 40)))


def test_each_model_has_a_page(model: DemoModel) -> None:
    app = demo_app(model, model)
    assert app.pages == [("", "Home", True), ("1-fashion-mnist", "fashion-mnist", True)]
    public = [fn.api_name for fn in app.fns.values() if fn.api_visibility == "public"]
    assert public == ["generate", "edit", "generate_1", "edit_1"]


def test_the_preset_of_a_form_has_all_scales_that_change_with_it() -> None:
    """The emoji preset is classifier-free where the network gets the label, else the classifier's."""
    found = [_preset(DemoModel.load("emoji", device="cpu"), hidden) for hidden in (True, False)]
    assert [(scale, free) for scale, *_, free in found] == [(6.0, 0.0), (0.0, 2.0)]


def test_a_folder_without_a_pipeline_does_not_hide_a_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)
    assert DemoModel.load("emoji", device="cpu").name == "emoji"
    with pytest.raises(ValueError, match="models=.*one or more of DemoModel"):
        demo_app()


def test_options_of_one_model_are_refused_for_several() -> None:
    with pytest.raises(SystemExit, match="--clip: only for one MODEL; 2 are given"):
        main(["demo", "a", "b", "--clip", "c"])


def test_what_a_form_shows_holds_against_a_preset() -> None:
    """A classifier-free scale of 0, and a power of 1, also where the model's preset has others."""
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    pipeline.register_to_config(
        defaults={**pipeline.config.defaults, "classifier_free_scale": 2.0, "guidance_power": 3}
    )
    form = SampleForm([SNEAKER], "", True, 1.0, 1, 0, start=0.0, stop=1.0, **FEW)
    code = sample_pictures(DemoModel("fashion-mnist", pipeline), form).code
    assert "classifier_free_scale=0," in code and "guidance_power=1," in code
    code = sample_pictures(DemoModel.load(), form).code
    assert "classifier_free_scale" not in code and "guidance_power" not in code


def test_where_nothing_steers_the_pictures_are_made_once(model: DemoModel) -> None:
    seen: list[tuple[int, int]] = []
    form = SampleForm([SNEAKER], "", True, 0, 1, 0, 0.0, 1.0, steps=2, num_images=1)
    result = sample_pictures(model, form, lambda *step: seen.append(step))
    assert seen[-1] == (2, 2) and result.record is None and result.summary == "1 image"
    assert result.guided.tobytes() == result.unguided.tobytes()
    assert sample_pictures(model, replace(form, scale=None)).record is not None  # the preset's


def test_models_that_make_no_pictures_from_noise_are_refused(tmp_path: Path) -> None:
    pipeline = ClassifierGuidedPipeline(tiny_unet(), DDPMScheduler(), data_mean=1.0, data_std=2.0)
    pipeline.save_pretrained(tmp_path / "arrays")
    with pytest.raises(ValueError, match="its samples are arrays"):
        DemoModel.load(tmp_path / "arrays")
    upsampler = ClassifierGuidedPipeline(tiny_unet(in_channels=6, out_channels=3), DDPMScheduler())
    upsampler.save_pretrained(tmp_path / "up")
    with pytest.raises(ValueError, match="6 input channels"):
        DemoModel.load(tmp_path / "up")


# ---------------------------------------------------------------- the page


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


class Server:
    """A process that serves the demo, on a port of the loopback; its output is in a file."""

    def __init__(self, command: list[str], port: int, folder: Path, **variables: str):
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        variables |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "gradio")}
        variables |= {"GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.begin = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=os.environ | variables
            )

    def wait(self) -> None:
        """Wait until it answers."""
        port = int(self.url.rpartition(":")[2])
        while self.process.poll() is None:
            with socket.socket() as place:
                if place.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, folder = free_port(), tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "guided_diffusers",
        "demo",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    server = Server(command, port, folder)
    server.wait()
    yield server
    server.stop()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    """A page of a headless Chromium that has loaded the demo."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"no browser ({', '.join(BROWSERS)}) is installed: apt-get install chromium"
        assert not os.environ.get("BROWSER_TEST"), reason  # set by .ci/run
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(300_000)
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(server.url)
        yield page
        browser.close()


def picture_at(page: Any, place: str) -> np.ndarray:
    """The picture in an element of the page, waited for."""
    page.wait_for_selector(f"#{place} img")
    response = page.request.get(page.get_attribute(f"#{place} img", "src"))
    with Image.open(io.BytesIO(response.body())) as picture:
        return np.asarray(picture)


def cells(picture: np.ndarray) -> list[bytes]:
    """The ten images of a grid of two rows."""
    rows = [np.split(row, 5, axis=1) for row in np.split(picture, 2)]
    return [cell.tobytes() for row in rows for cell in row]


def generate(page: Any) -> None:
    """Click, and wait until the new picture is there."""
    image = page.query_selector("#guided img")
    before = image.get_attribute("src") if image else None
    page.click("#generate")
    page.wait_for_function(
        "before => { const image = document.querySelector('#guided img');"
        " return image && image.src !== before }",
        arg=before,
    )


def choose(page: Any, place: str, name: str) -> None:
    """Choose an entry of a list."""
    page.click(f"#{place} input")
    page.click(f"#{place} [role=option][aria-label='{name}']")
    page.keyboard.press("Escape")


def test_in_a_browser_a_label_changes_ten_pictures(
    page: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.wait_for_selector("#generate")
    page.click("#labels [title='Remove 0']")  # the t-shirt
    choose(page, "labels", "sneaker")
    generate(page)
    seconds, used = time.monotonic() - server.begin, psutil.Process(server.process.pid).cpu_times()
    print(f"first picture {seconds:.1f} s after the command, CPU {used.user + used.system:.1f} s")
    assert used.user + used.system < 40
    sneakers, unguided = picture_at(page, "guided"), picture_at(page, "unguided")
    assert len(set(cells(sneakers))) == 10
    changed = [a != b for a, b in zip(cells(sneakers), cells(unguided), strict=True)]
    assert all(changed)
    assert picture_at(page, "steps").shape[1] > 1000
    assert "10 images, guidance evaluated" in page.inner_text("#summary")
    if path := os.environ.get("DEMO_SCREENSHOT"):  # examples/figures/demo.png
        page.wait_for_timeout(1000)
        page.screenshot(path=ROOT / path)

    code = page.inner_text("#code .cm-content")
    run_code(code, tmp_path, monkeypatch)
    with Image.open("picture.png") as picture:
        assert np.array_equal(picture, sneakers)

    choose(page, "labels", "bag")  # a mixture of both
    generate(page)
    mixture = picture_at(page, "guided")
    assert all(a != b for a, b in zip(cells(mixture), cells(sneakers), strict=True))
    assert np.array_equal(picture_at(page, "unguided"), unguided)  # the same seeds

    page.get_by_role("tab", name="Edit a picture").click()
    page.click("#take")
    page.wait_for_selector("#picture img")
    choose(page, "new-label", "ankle boot")
    page.click("#edit")
    assert picture_at(page, "comparison").shape[1] > 500

    own = (server.url, "data:", "blob:")
    assert not [url for url in page.requests if not url.startswith(own)] and not page.errors
    assert "Traceback" not in server.log.read_text()


def wait_for_message(page: Any, field: str, value: str, message: str) -> None:
    """Fill a field and click until the page shows the message.

    Text that comes before Gradio has set up a field that was folded in is lost; a person who sees
    it go types it again.
    """
    from playwright.sync_api import TimeoutError

    for _ in range(4):
        page.fill(field, value)
        page.wait_for_timeout(500)
        page.click("#generate")
        with suppress(TimeoutError):
            return page.locator(f"text={message} >> visible=true").first.wait_for(timeout=75_000)
    raise AssertionError(f"{message!r} isn't in {page.inner_text('body')!r}")


def test_in_a_browser_a_wrong_input_is_a_message(page: Any, server: Server) -> None:
    wait_for_message(page, "#seed input", "-1", "seed=-1: an integer from 0 to")
    page.fill("#seed input", "0")
    page.click("text=Mixture, caption and interval")
    caption = "#caption textarea, #caption input"
    wait_for_message(page, caption, "<b>zebra</b>", "<b>zebra</b>")  # as text, not as HTML
    assert "Traceback" not in server.log.read_text()


def test_in_a_browser_each_bundled_model_has_a_page(page: Any, server: Server) -> None:
    page.wait_for_selector("#generate")
    page.get_by_role("link", name="emoji").or_(page.get_by_role("button", name="emoji")).click()
    page.wait_for_url("**/emoji")
    page.wait_for_selector("text=guided-diffusers: emoji")
    generate(page)
    assert picture_at(page, "guided").ndim == 3  # in colour
    assert not page.errors


def client_of(server: Server) -> Any:
    from gradio_client import Client

    return Client(server.url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 300})


def test_only_this_machine_reaches_the_demo(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    connections = [c for p in (process, *process.children()) for c in p.net_connections("inet")]
    addresses = [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    assert addresses and set(addresses) == {"127.0.0.1"}
    assert all(c.raddr.ip == "127.0.0.1" for c in connections if c.raddr)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.2", "localhost.example")),
    ],
)
def test_which_hosts_are_open_to_other_machines(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.fixture
def client(model: DemoModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Of an app in this process, where at most two calls wait."""
    from gradio_client import Client

    monkeypatch.setattr("guided_diffusers.demo.app.MAX_WAITING", 2)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = demo_app(model)
    try:
        yield Client(start(app), verbose=False, analytics_enabled=False)
    finally:
        app.close(verbose=False)


def test_a_second_click_waits_for_the_first(
    client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also one of the other tab: the pipeline refuses a call while another one uses its scheduler."""
    from gradio_client import handle_file

    begun, finish, order = threading.Event(), threading.Event(), []

    def sample(*arguments: Any) -> Any:
        begun.set()
        assert finish.wait(60)
        pictures = sample_pictures(*arguments)
        order.append("sampled")
        return pictures

    def edit(*arguments: Any) -> Any:
        order.append("edit begins")
        return edit_picture(*arguments)

    monkeypatch.setattr("guided_diffusers.demo.app.sample_pictures", sample)
    monkeypatch.setattr("guided_diffusers.demo.app.edit_picture", edit)
    Image.new("L", (28, 28), 100).save(tmp_path / "grey.png")
    picture = handle_file(tmp_path / "grey.png")
    first = client.submit(labels=[SNEAKER], steps=2, num_images=1, api_name="/generate")
    assert begun.wait(60)
    fields = {"picture": picture, "label": BOOT, "source_label": SNEAKER, "steps": 2}
    second = client.submit(**fields, strength=0.6, scale=3.0, api_name="/edit")
    deadline = time.monotonic() + 60
    while second.status().code.name != "IN_QUEUE" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not order
    finish.set()
    assert "1 image, guidance evaluated" in first.result(60)[2]
    assert "mean change" in second.result(60)[1]
    assert order == ["sampled", "edit begins"]


def test_a_full_queue_is_a_message_and_an_unexpected_error_is_logged(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    begun, finish = threading.Event(), threading.Event()

    def sample(*_: Any) -> None:
        begun.set()
        finish.wait(60)
        raise LookupError("an accident")

    monkeypatch.setattr("guided_diffusers.demo.app.sample_pictures", sample)
    calls = [client.submit(api_name="/generate")]
    assert begun.wait(60)
    calls += [client.submit(api_name="/generate") for _ in range(3)]  # one more than may wait
    deadline = time.monotonic() + 60
    while not any(call.done() for call in calls) and time.monotonic() < deadline:
        time.sleep(0.02)
    finish.set()
    messages = [str(call.exception(60)) for call in calls]
    assert sum("full" in message for message in messages) == 1, messages
    assert sum("unexpected LookupError: an accident" in message for message in messages) == 3
    assert caplog.text.count("Traceback") == caplog.text.count("LookupError: an accident") == 3


def test_a_used_port_and_a_wrong_host_are_named(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(SystemExit, match=f"demo: --host 127.0.0.1 --port {port} can't be used: "):
        main(["demo", "--port", port])
    with pytest.raises(SystemExit, match="demo: --host 203.0.113.7 can't be used: "):
        main(["demo", "--host", "203.0.113.7"])


# ---------------------------------------------------------------- the Space


def test_a_space_runs_as_it_is_and_answers(tmp_path: Path) -> None:
    folder = tmp_path / "space"
    main(["space", str(folder)])
    card = SpaceCard.load(folder / "README.md").data
    assert (card.sdk, card.app_file, card.license) == ("gradio", "app.py", "apache-2.0")
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert f"gradio=={card.sdk_version}" in requirements and "torch>=2.6" in requirements
    assert not [line for line in requirements if "extra" in line]
    where = subprocess.run(
        [sys.executable, "-c", "import guided_diffusers; print(guided_diffusers.__file__)"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(folder)  # its own copy of the package

    port = free_port()
    server = Server([sys.executable, "app.py"], port, folder, PYTHONPATH="")
    try:
        server.wait()
        client = client_of(server)
        fields = {"labels": [SNEAKER], "steps": 2, "num_images": 1, "scale": 3.0}
        unguided, guided, summary, *_ = client.predict(**fields, api_name="/generate")
        assert "1 image, guidance evaluated" in summary
        with Image.open(unguided) as before, Image.open(guided) as after:
            assert before.size == after.size and not np.array_equal(before, after)
        large = {"files": ("large.png", bytes(21 * 2**20))}
        assert httpx.post(f"{server.url}/gradio_api/upload", files=large).status_code == 413
    finally:
        server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_space_has_the_model_of_a_folder(tmp_path: Path) -> None:
    pipeline = ClassifierGuidedPipeline(tiny_unet(), DDPMScheduler(), tiny_classifier())
    pipeline.save_pretrained(tmp_path / "a: model")
    with pytest.raises(ValueError, match="license: the card of .* names none; give one"):
        write_space(tmp_path / "space", tmp_path / "a: model")
    assert not (tmp_path / "space").exists()
    write_space(tmp_path / "space", tmp_path / "a: model", license="cc-by-4.0")
    card = SpaceCard.load(tmp_path / "space" / "README.md").data
    assert card.license == "cc-by-4.0" and card.title == "Guided diffusion, a: model"
    assert 'DemoModel.load(FOLDER / "model")' in (tmp_path / "space" / "app.py").read_text()
    copy = ClassifierGuidedPipeline.from_pretrained(tmp_path / "space" / "model")
    assert torch.equal(copy.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    models = (tmp_path / "space" / "guided_diffusers" / "bundled").glob("*/model_index.json")
    assert not list(models)  # nothing that it doesn't show
    with pytest.raises(ValueError, match="exists; a new or an empty folder is allowed"):
        write_space(tmp_path / "space", "fashion-mnist")


def test_without_gradio_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=re.escape("demo: the demo needs Gradio 6: pip install")):
        main(["demo"])
