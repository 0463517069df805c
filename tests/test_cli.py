"""The program `guided-diffusers`, and sampling by seeds, on a tiny random pipeline."""

from __future__ import annotations

import ast
import copy
import re
import shutil
import unicodedata
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.files import check_writable
from guided_diffusers.sampling import grid, image_generator, sample
from guided_diffusers.text import code_literal, markdown, markdown_code, one_line, printable
from guided_diffusers.utils import find_scheduler, is_hub_id, model_folder

NAMES = {0: "boot", 1: "coat", 2: "7"}


@pytest.fixture(scope="module")
def pipeline() -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        8,
        1,
        1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    classifier = NoiseAwareClassifier(
        8,
        1,
        3,
        (8,),
        ("ResnetDownsampleBlock2D",),
        1,
        attention_head_dim=8,
        norm_num_groups=4,
        id2label=NAMES,
    )
    torch.nn.init.normal_(classifier.head[-1].out.weight)
    return ClassifierGuidedPipeline(unet, DDIMScheduler(clip_sample=False), classifier)


@pytest.fixture(scope="module")
def folder(pipeline: ClassifierGuidedPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(path)
    return str(path)


def run(folder: str, *arguments: str) -> None:
    main(["sample", "--model", folder, "--num-inference-steps", "3", "--quiet", *arguments])


def test_a_picture(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(
        folder,
        "--label",
        "boot",
        "--guidance-scale",
        "3",
        "--output",
        str(tmp_path / "a" / "boots.png"),
    )
    assert Image.open(tmp_path / "a" / "boots.png").size == (
        5 * 80,
        2 * 80,
    )  # 8 pixels, enlarged tenfold
    said = capsys.readouterr().out
    assert "10 images of boot (guidance scale 3, DDIMScheduler" in said and " s: " in said
    assert [path.name for path in (tmp_path / "a").iterdir()] == [
        "boots.png"
    ]  # nothing temporary is left


def test_a_folder_and_batches(folder: str, tmp_path: Path) -> None:
    """LABEL/NUMBER.png; the same images for any batch size; ids and names, a name that looks like an id."""
    for batch_size in ("2", "64"):
        run(
            folder,
            "--label",
            "0",
            "coat",
            "7",
            "--num-images",
            "7",
            "--batch-size",
            batch_size,
            "--output",
            str(tmp_path / batch_size),
        )
    files = sorted(path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*.png"))
    assert [str(path) for path in files] == [
        "7/000002.png",
        "7/000005.png",
        "boot/000000.png",
        "boot/000003.png",
        "boot/000006.png",
        "coat/000001.png",
        "coat/000004.png",
    ]
    for path in files:
        pixels = [
            torch.tensor(list(Image.open(tmp_path / size / path).tobytes())) for size in ("2", "64")
        ]
        assert (pixels[0] - pixels[1]).abs().max() <= 1  # float rounding of another batch size


def test_options_have_an_effect(folder: str, tmp_path: Path) -> None:
    variants = {
        "plain": [],
        "seed": ["--seed", "1"],
        "scale": ["--guidance-scale", "50"],
        "label": [],
        "scheduler": ["--scheduler", "ddpm"],
        "steps": ["--num-inference-steps", "5"],
        "unconditional": ["--no-conditional"],
        "classifier-free": ["--classifier-free-scale", "5"],
    }
    pictures = {}
    for name, extra in variants.items():
        label = "coat" if name == "label" else "boot"
        run(
            folder,
            "--label",
            label,
            "--num-images",
            "1",
            "--output",
            str(tmp_path / f"{name}.png"),
            *extra,
        )
        pictures[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert len(set(pictures.values())) == len(variants)


def test_how_guidance_acts_has_an_effect(folder: str, tmp_path: Path) -> None:
    pictures = []
    for extra in (
        [],
        ["--guidance-algorithm", "strang"],
        ["--guidance-every", "3"],
        ["--guidance-tolerance", "10"],
        ["--guidance-schedule", "0.1:0.5,10:3"],
    ):
        run(
            folder,
            "--label",
            "boot",
            "--num-images",
            "1",
            "--guidance-scale",
            "50",
            "--num-inference-steps",
            "20",
            "--output",
            str(tmp_path / "x.png"),
            *extra,
        )
        pictures.append(Image.open(tmp_path / "x.png").tobytes())
    assert pictures[0] not in pictures[1:]


def test_all_labels_in_rows(folder: str, tmp_path: Path) -> None:
    run(folder, "--label", "all", "--num-images", "6", "--output", str(tmp_path / "all.png"))
    width, height = Image.open(tmp_path / "all.png").size
    assert height == 3 * 80 and width > 2 * 80  # 8 pixels, enlarged tenfold, and the names in front


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--label", "hat"],
            r"label 'hat' is unknown; allowed: ids 0 to 2 and the names \['7', 'boot', 'coat'\]",
        ),
        (["--label", "9"], "label 9 is unknown"),
        (
            ["--label", "boot", "--scheduler", "fast"],
            "scheduler 'fast' is unknown; .*the nearest are .*Scheduler",
        ),
        (
            ["--label", "boot", "--scheduler", "FlowMatchEuler"],
            "FlowMatchEulerDiscreteScheduler doesn't fit the model",
        ),
        (["--label", "boot", "--device", "abacus"], "abacus"),
        (
            ["--label", "boot", "--num-images", "0"],
            "--num-images 0: an integer, 1 or more, is allowed",
        ),
        (
            ["--label", "boot", "--batch-size", "0"],
            "--batch-size 0: an integer, 1 or more, is allowed",
        ),
    ],
)
def test_wrong_arguments(folder: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(folder, *arguments, "--output", str(tmp_path / "x.png"))
    assert not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"guided-diffusers {version('guided-diffusers')}\n"


def test_unknown_model() -> None:
    with pytest.raises(SystemExit, match="model 'nothing-like-it' is not bundled; allowed"):
        main(["sample", "--model", "nothing-like-it", "--label", "0"])


def test_a_model_is_a_bundled_name_a_folder_or_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (Path(model_folder("fashion-mnist")) / "judge" / "config.json").is_file()
    assert model_folder(tmp_path) == tmp_path and not is_hub_id(tmp_path)
    assert model_folder("user/model") == "user/model" and is_hub_id("user/model")
    monkeypatch.chdir(tmp_path)
    for name in ("fashion-mnist", "user/model"):  # the folder of a model comes first
        Path(name).mkdir(parents=True)
        Path(name, "config.json").write_text("{}")
        assert model_folder(name) == name and not is_hub_id(name)
    with pytest.raises(ValueError, match="model 'unknown' is not bundled; allowed"):
        model_folder("unknown")


def test_find_scheduler() -> None:
    for name, found in (
        ("ddim", "DDIMScheduler"),
        ("Euler", "EulerDiscreteScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("PNDMScheduler", "PNDMScheduler"),
        ("EulerAncestral", "EulerAncestralDiscreteScheduler"),
    ):
        assert find_scheduler(name).__name__ == found
    with pytest.raises(ValueError, match="unknown"):
        find_scheduler("VQDiffusion")  # can't be guided


def test_image_generators_differ() -> None:
    draws = {
        tuple(torch.randn(2, generator=image_generator(seed, i)).tolist())
        for seed in range(4)
        for i in range(4)
    }
    assert len(draws) == 16


def test_sample_is_the_same_for_any_share(pipeline: ClassifierGuidedPipeline) -> None:
    """Two processes with every other image make what one makes."""
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    whole = {
        i: image
        for batch, images in sample(pipeline, ["boot", 1], 5, 4, range(6), **call)
        for i, image in zip(batch, images, strict=True)
    }
    assert sorted(whole) == list(range(6))
    for share in (range(0, 6, 2), range(1, 6, 2)):
        for batch, images in sample(pipeline, ["boot", 1], 5, 2, share, **call):
            for i, image in zip(batch, images, strict=True):
                torch.testing.assert_close(image, whole[i], atol=1e-4, rtol=1e-4)


def test_grid() -> None:
    images = [Image.new("L", (28, 28), i * 20) for i in range(6)]
    assert grid(images).size == (3 * 84, 2 * 84)
    assert grid(images[:1]).size == (84, 84)
    assert grid(images + images[:1]).size == (3 * 84, 3 * 84)  # seven in a row would be too long
    picture = grid(images, ["a", "b", "c"])
    assert picture.height == 3 * 84 and picture.getpixel((picture.width - 1, 0))[0] == 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect M --dataset D --output file/a", "--output file/a/diagnosis.json can't be"),
        ("inspect M --dataset D --output full", "--output full/diagnosis.png .* it is a folder"),
        ("evaluate I --dataset D --output file", "--output file/evaluation.json can't be written"),
        ("evaluate I --dataset D --output full", "--output full/confusion.png .* it is a folder"),
        ("evaluate I --dataset D --cache file", "--cache file can't be .* it is a file, not a fo"),
        ("sweep --reference D --output file/a", "output file/a can't be written: Not a direct"),
        ("sweep --reference D --output full", "output full/report.html .* it is a folder"),
        ("convert --unet file --preset adm --output file/a", "output file/a can't be written"),
        ("convert --unet file --output full", "output full exists already"),
        ("push M a/b/c", "repo 'a/b/c': user/model is allowed"),
        ("push M https://huggingface.co/a/b", "repo 'https://.*': user/model is allowed"),
        ("push M user/a --revision a..b", "revision 'a..b': a branch's name"),
        ("push M user/a --revision v1.lock", "revision 'v1.lock': a branch's name"),
        ("push M user/a --datasets my/own/data", "datasets 'my/own/data': the id of a dataset"),
        ("card M --repo a/-b", "repo 'a/-b': user/model is allowed"),
        ("pull a..b/c folder", "repo 'a..b/c': user/model is allowed"),
        ("pull user/a file", "folder file can't be written: it is a file, not a folder"),
    ],
)
def test_what_can_not_be_written_is_found_before_the_work(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is loaded: neither the models nor the data exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Path("file").touch()
    for name in ("diagnosis.png", "confusion.png", "report.html"):
        Path("full", name).mkdir(parents=True)
    with pytest.raises(SystemExit, match=message):
        main(line.split())
    names = {path.name for path in Path().rglob("*")}
    assert names == {"file", "full", "diagnosis.png", "confusion.png", "report.html"}


def test_a_check_of_an_output_leaves_nothing_and_knows_the_space(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    check_writable(path, "--output", size=1)
    check_writable(tmp_path / "a" / "b", "--output", folder=True)
    assert not list(tmp_path.iterdir())
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="--output .*x.json can't be written: .* MiB are needed, "):
        check_writable(path, "--output", size=2 * free)
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    check_writable(path, "--output")
    assert path.read_text() == "kept" and len(list(path.parent.iterdir())) == 1


READABLE = [
    "Fashion-MNIST, 28x28 (v2)",
    "コート　とシャツ",
    "안녕",
    "שלום",
    "می\u200cخواهم",
    "क्\u200dष",
    "\U0001f469\U0001f3fd\u200d\U0001f4bb",
    "\u2764\ufe0f\u200d\U0001f525",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "1\ufe0f\u20e3",
    "C:\\data\\new",
]
HIDDEN = {
    "red\x1b[31m": r"red\x1b[31m",
    "bell\x07\x08": r"bell\x07\x08",
    "two\nlines\r\t": r"two\nlines\r\t",
    "c1\x9b2J": r"c1\x9b2J",
    "\u202egnp.exe\u2066": r"\u202egnp.exe\u2066",
    "a\u200bb\u2060\ufeff": r"a\u200bb\u2060\ufeff",
    "a\u200db": r"a\u200db",
    "あ\u200d\u200dい": r"あ\u200d\u200dい",
    "\u200d": r"\u200d",
    "s\ufe0f": r"s\ufe0f",
    "soft\xad": r"soft\xad",
    "para\u2029graph\u2028": r"para\u2029graph\u2028",
    "tag\U000e0041": r"tag\U000e0041",
    "lone\udcff": r"lone\udcff",
    "nul\0": r"nul\x00",
    "\u3164": r"\u3164",
}


def test_names_on_the_terminal() -> None:
    """Every script stays readable; what acts on the terminal, or can't be seen, is an escape."""
    assert [printable(text) for text in READABLE] == READABLE
    assert {text: printable(text) for text in HIDDEN} == HIDDEN
    for character in map(chr, range(0x110000)):
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(f"a{character}b").isascii()
    assert one_line("first\n\n  second\x1b\r\nthird") == r"first second\x1b third"


@pytest.mark.parametrize(
    "text", [*READABLE, *HIDDEN, "a|b", "`x`", "[x](http://a.b)", "<b>&lt;", "$x$"]
)
def test_names_in_code(text: str) -> None:
    assert ast.literal_eval(code_literal(text)) == text
    assert "\n" not in code_literal(text) and printable(code_literal(text)) == code_literal(text)


def test_names_in_markdown() -> None:
    """Nothing but the text itself is left of markup, as a parser of Markdown sees it."""
    text = "a|b `c` [d](http://e) ![f](g) <script>h</script> &lt; *i* _j_ **k** ~~l~~ $m$ \\n\n# o"
    escaped = markdown(text)
    assert "\n" not in escaped
    for mark in "|`[]<>&*_~$":
        count = len(re.findall(rf"(?<!\\)(?:\\\\)*{re.escape(mark)}", escaped))
        assert count == 0, mark
    assert re.sub(r"\\([^A-Za-z0-9\s])", r"\1", escaped) == printable(text)
    assert markdown_code("a`b``c\n") == r"``` a`b``c\n ```"
    assert markdown_code("plain") == "`plain`"


def test_commands_print_no_control_sequences(
    pipeline: ClassifierGuidedPipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labels = ["a\x1b[31m\nb", "\u202ec", "\U0001f469\u200d\U0001f4bb コート"]
    classifier = copy.deepcopy(pipeline.classifier)
    names = {"id2label": dict(enumerate(labels)), "label2id": None}
    classifier.register_to_config(**names)
    changed = ClassifierGuidedPipeline(pipeline.unet, pipeline.scheduler, classifier)
    changed.save_pretrained(tmp_path / "model")
    output = tmp_path / "x\x1b]0;title\x07.png"
    run(str(tmp_path / "model"), "--label", "all", "--num-images", "3", "--output", str(output))
    captured = capsys.readouterr()
    assert output.exists() and captured.out.count("\n") == 1
    for text in (r"a\x1b[31m\nb, \u202ec, ", labels[2], r"x\x1b]0;title\x07.png"):
        assert text in captured.out
    for arguments in (
        ["sample", "--label", "0", "--model", "no\x1b[2Jmodel\nsecond"],
        ["sample", "--label", "no\x1b[2J\nsecond", "--model", str(tmp_path / "model")],
        ["sample", "--label", "0", "--no\x1b[2J\nsecond"],
        ["card", "no\x1b[2J\nsecond"],
        ["no\x1b[2J\nsecond"],
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        code = error.value.code
        text = capsys.readouterr().err + (code if isinstance(code, str) else "")
        assert printable(text.replace("\n", "")) == text.replace("\n", ""), arguments
        assert "x1b[2J" in text.splitlines()[-1] and "second" in text.splitlines()[-1]
