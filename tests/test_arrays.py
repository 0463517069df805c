"""Arrays as data: columns and folders of .npy, their scale, and what the training scripts make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, List, Value
from diffusers import DDIMScheduler, UNet1DModel, UNet2DModel
from helpers import load_script
from test_hub import make_classifier

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.assembly import assembled
from guided_diffusers.cli import main
from guided_diffusers.diagnosis import diagnose, inspect
from guided_diffusers.evaluation import evaluate, load_network, open_generated, open_real
from guided_diffusers.evaluation.networks import wrap_classifier
from guided_diffusers.learning.arrays import LabelledArrays, find_array_column, parse_data_scale
from guided_diffusers.learning.data import load_splits
from guided_diffusers.sampling import sample_to_folder
from guided_diffusers.utils import image_generator

UNET_1D = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownResnetBlock1D"] * 2,
    "up_block_types": ["UpResnetBlock1D"],
    "mid_block_type": "MidResTemporalBlock1D",
    "out_block_type": "OutConv1DBlock",
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "act_fn": "mish",
    "_class_name": "UNet1DModel",
}


UNET_1D_MODEL = {name: value for name, value in UNET_1D.items() if name != "_class_name"}


def signals(count: int = 24, length: int = 8) -> tuple[np.ndarray, list[int]]:
    """(count, 2, length): channel 0 around 5 with deviation 3, channel 1 around -1; labels 0 to 2."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(count, 2, length)) * [[[3.0], [0.5]]] + [[[5.0], [-1.0]]]
    labels = [i % 3 for i in range(count)]
    values[:, 0] += 4 * np.array(labels)[:, None]
    return values.astype(np.float32), labels


def write_npy(root: Path, values: np.ndarray, labels: list[int]) -> Path:
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        folder = root / ("test" if i % 6 == 5 else "train") / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i:03d}.npy", value)
    return root


def test_a_teacher_of_clean_arrays_gets_them_in_the_datas_units(tmp_path: Path) -> None:
    """The dataset's items are standardised, and so is what its network gets: not twice."""
    values, labels = signals()
    data = LabelledArrays(load_splits(str(write_npy(tmp_path, 5 + values, labels)))["train"], "npy")
    config = {"sample_size": 8, "in_channels": 2, "num_labels": 3, "dims": 1}
    config |= {"block_out_channels": (8,), "down_block_types": ("ResnetDownsampleBlock2D",)}
    config |= {"norm_num_groups": 4, "num_train_timesteps": 1, "attention_head_dim": 8}
    scale = {"data_mean": data.data_mean, "data_std": data.data_std}
    torch.manual_seed(0)
    model = NoiseAwareClassifier(**config, **scale).eval()
    torch.nn.init.normal_(model.last_layer.weight)
    items = torch.stack([data[i]["pixel_values"] for i in range(5)])
    teacher = load_script("train_classifier").clean_input(wrap_classifier(model), data)
    with torch.no_grad():
        torch.testing.assert_close(teacher(items)[1], model(items, 0).logits, atol=1e-4, rtol=1e-4)


def test_columns_of_arrays_and_lists_and_npy_files_are_the_same_data(tmp_path: Path) -> None:
    values, labels = signals()
    names = ClassLabel(names=list("abc"))
    kinds = {
        "array": Array2D((2, 8), "float32"),
        "lists": List(List(Value("float32"))),
    }
    parts = []
    for feature in kinds.values():
        features = Features({"signal": feature, "label": names})
        rows = {"signal": list(values), "label": labels}
        parts.append(Dataset.from_dict(rows, features=features))
    (tmp_path / "parquet").mkdir()
    parts[0].to_parquet(tmp_path / "parquet" / "train.parquet")
    parts.append(load_splits(str(tmp_path / "parquet"))["train"])
    splits = load_splits(str(write_npy(tmp_path / "npy", values, labels)))
    assert splits["test"].num_rows == 4 and splits["test"].features["label"].names == list("abc")
    for dataset in parts:
        column = find_array_column(dataset, None, None)
        data = LabelledArrays(dataset, column)
        assert (
            data.channels == 2 and data.resolution == 8 and data.id2label == dict(enumerate("abc"))
        )
        np.testing.assert_allclose(data.data_mean, values.mean((0, 2)), rtol=1e-5)
        np.testing.assert_allclose(data.data_std, values.std((0, 2)), rtol=1e-5)
        items = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
        torch.testing.assert_close(items.mean((0, 2)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            items.std((0, 2), correction=0), torch.ones(2), atol=1e-4, rtol=0
        )
        assert data.labels_of_rows() == labels and data[4]["label"] == 1
        undone = (
            items * torch.tensor(data.data_std)[:, None] + torch.tensor(data.data_mean)[:, None]
        )
        torch.testing.assert_close(undone, torch.from_numpy(values), atol=1e-4, rtol=1e-4)
        train, held_out = data.hold_out(0.25)
        assert torch.equal(train[0]["pixel_values"], items[train.numbers[0]])
        assert len(train) + len(held_out) == 24
    files = LabelledArrays(splits["train"], "npy", scale=(0.0, 1.0))
    path = splits["train"][3]["npy"]
    np.testing.assert_array_equal(files[3]["pixel_values"], np.load(path))
    assert files.id2label[files[3]["label"]] == Path(path).parent.name


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((8,), None, (1, 8)),
        ((2, 8), None, (2, 8)),
        ((8, 2), "last", (2, 8)),
        ((4, 6), "none", (1, 4, 6)),
        ((3, 4, 6), "first", (3, 4, 6)),
        ((4, 6, 5), "none", (1, 4, 6, 5)),
    ],
)
def test_axes_of_channels(shape: tuple, axis: str | None, expected: tuple, tmp_path: Path) -> None:
    values = np.arange(2 * np.prod(shape), dtype=np.float64).reshape(2, *shape)
    for i, value in enumerate(values):
        np.save(tmp_path / f"{i}.npy", value)
    splits = load_splits(str(tmp_path))
    data = LabelledArrays(splits["train"], "npy", channel_axis=axis, scale=(0.0, 1.0))
    item = data[1]["pixel_values"]
    assert item.shape == data.shape == expected
    channels_first = np.moveaxis(values[1], -1, 0) if axis == "last" else values[1]
    np.testing.assert_array_equal(item.numpy(), channels_first.reshape(expected))


def test_scales() -> None:
    assert parse_data_scale("standard") is None and parse_data_scale("none") == (0, 1)
    mean, std = parse_data_scale("-2,6")
    assert [(value - mean) / std for value in (-2, 6)] == [-1, 1]
    for text in ("2,1", "1", "a,b", "0,inf"):
        with pytest.raises(ValueError, match=f"--data_scale '{text}': standard .*LOW,HIGH"):
            parse_data_scale(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: np.save(folder / "9.npy", np.ones(7)),
            r"9.npy\).*shape \(1, 7\), the first",
        ),
        (lambda folder: np.save(folder / "9.npy", np.full(8, np.nan)), "9.npy.*infinite or NaN"),
        (lambda folder: (folder / "9.npy").write_text("text"), "9.npy.* can't be used"),
        (
            lambda folder: np.save(folder / "9.npy", np.array([{}]), allow_pickle=True),
            "9.npy.* can't be used: .*allow_pickle=False",
        ),
        (lambda folder: np.save(folder / "9.npy", np.array(["a"] * 8)), "9.npy.*not numbers"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(
    change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.arange(8.0) + i)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        LabelledArrays(load_splits(str(tmp_path))["train"], "npy")


def test_constant_data_have_no_standard_scale(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((2, 8), [[i], [7.0]]))
    with pytest.raises(
        ValueError, match="--data_scale standard: channel 1 of the arrays is constant"
    ):
        LabelledArrays(load_splits(str(tmp_path))["train"], "npy")


def test_signals_are_trained_on_assembled_and_sampled_in_their_units(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    values, labels = signals()
    folder = write_npy(tmp_path / "data", values, labels)
    (tmp_path / "unet1d.json").write_text(json.dumps(UNET_1D))
    line = "--max_train_steps 2 --lr_warmup_steps 0 --resolution 64 --num_train_epochs 1"
    data = f"--train_data_dir {folder}"
    unet = train(
        "unet",
        f"{line} --model_config_name_or_path {tmp_path / 'unet1d.json'} --sample_images 4",
        "unet",
        data,
    )
    classifier = train("classifier", line, "classifier", data)
    trained = ClassifierGuidedPipeline.from_pretrained(unet)
    assert type(trained.unet) is UNet1DModel and trained.unet.config.in_channels == 2
    assert np.load(unet / "samples-2.npz")["arr_0"].shape == (4, 2, 8)
    guide = NoiseAwareClassifier.from_pretrained(classifier)
    assert guide.config.dims == 1 and guide.config.sample_size == 8
    assert guide.config.data_mean == trained.config.data_mean
    assert guide.config.id2label == dict(enumerate("abc"))
    pipeline = assembled(unet, classifier)
    pipeline.set_progress_bar_config(disable=True)
    images, latents = (
        pipeline(["a", "c"], num_inference_steps=3, latents=torch.ones(2, 2, 8), output_type=kind)
        for kind in ("np", "latent")
    )
    mean, std = (np.array(guide.config[name])[:, None] for name in ("data_mean", "data_std"))
    np.testing.assert_allclose(images.images, mean + std * latents.images.numpy(), rtol=1e-5)
    values = values[[i for i in range(24) if i % 6 != 5]]
    np.testing.assert_allclose(mean[:, 0], values.mean((0, 2)), rtol=1e-5)
    other = NoiseAwareClassifier.from_config({**guide.config, "data_mean": [0.0, 0.0]})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the classifier's data_mean is"):
        assembled(unet, tmp_path / "other")


def test_the_inspect_command_after_a_training_on_arrays(
    train: Callable[..., Path],
    place: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """It works as printed; its table is that of the arrays in the classifier's units and labels."""
    values, labels = signals()
    folder = write_npy(tmp_path / "data", values.transpose(0, 2, 1), labels)  # channels last
    line = "--max_train_steps 2 --lr_warmup_steps 0 --resolution 64 --channel_axis last"
    classifier = train("classifier", line, "classifier", f"--train_data_dir {folder}")
    printed = capsys.readouterr().out
    (command,) = (text for text in printed.splitlines() if "guided-diffusers inspect" in text)
    assert str(folder) in command and command.endswith("# is it fit to guide?")
    words = command.partition("#")[0].split()[1:]
    pipeline = ClassifierGuidedPipeline(
        UNet1DModel(sample_size=8, in_channels=2, out_channels=2, **UNET_1D_MODEL),
        DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        data_mean=5.0,
        data_std=3.0,
    )
    pipeline.save_pretrained(tmp_path / "unet")
    replaced = {"UNET": str(tmp_path / "unet"), "DIAGNOSIS": str(tmp_path / "diagnosis")}
    words = [replaced.get(word, word) for word in words]
    options = {"levels": 3, "gradient_images": 4}
    main([*words, "--quiet", "--device", "cpu", "--levels", "3", "--gradient-images", "4"])
    found = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    guide = NoiseAwareClassifier.from_pretrained(classifier)
    test = load_splits(str(folder))["test"]
    scale = guide.config.data_mean, guide.config.data_std
    data = LabelledArrays(test, "npy", channel_axis="last", scale=scale)
    assert abs(float(data[0]["pixel_values"].mean())) < 1 and data.shape == (2, 8)
    parts = {"scheduler": pipeline.scheduler, "unet": pipeline.unet, "progress": False}
    assert found["levels"] == json.loads(
        json.dumps(diagnose(guide, data, **parts, **options).levels)
    )
    assert not any("[-1, 1]" in text for text in found["mismatches"])
    scales = (
        "the classifier's data_mean is {}, the network's 5.0",
        "data_std is {}, the network's 3.0",
    )
    for text, values in zip(scales, scale, strict=True):
        assert any(text.format(values) in sentence for sentence in found["mismatches"])
    with pytest.raises(SystemExit, match=r"no column of arrays, which the classifier \(dims=1"):
        main(["inspect", str(classifier), "--dataset", str(place.folder), "--quiet"])
    make_classifier().save_pretrained(tmp_path / "of_images")
    with pytest.raises(
        ValueError, match="column 'npy' has arrays, and the classifier reads images"
    ):
        inspect(str(tmp_path / "of_images"), str(folder))
    with pytest.raises(SystemExit, match="image_range=.*None is allowed with arrays"):
        main([*words, "--image-range", "0,1", "--quiet"])


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_arrays_are_sampled_to_files_and_evaluated_by_a_judge(form: str, tmp_path: Path) -> None:
    """The judge gets the data's units undone; of real data as generated data it agrees as on the real."""
    values, labels = signals(60)
    pipeline = ClassifierGuidedPipeline(
        UNet1DModel(sample_size=8, in_channels=2, out_channels=2, **UNET_1D_MODEL),
        DDIMScheduler(clip_sample=False),
        id2label=dict(enumerate("abc")),
        data_mean=[5.0, -1.0],
        data_std=[3.0, 0.5],
    )
    judge = NoiseAwareClassifier(
        sample_size=8,
        in_channels=2,
        num_labels=3,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        downsample_type="conv",
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        pool="adaptive",
        num_train_timesteps=1,
        dims=1,
        data_mean=[9.0, -1.0],
        data_std=[5.0, 0.5],
        id2label=dict(enumerate("abc")),
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(judge.head[-1].weight)
    judge.save_pretrained(tmp_path / "judge")
    pipeline.classifier = judge_like = NoiseAwareClassifier.from_config(
        {**judge.config, "num_train_timesteps": 1000}
    )
    assert judge_like.config.data_std == [5.0, 0.5] and pipeline.has_arrays
    folder = tmp_path / "samples"
    options = {"seed": 0, "batch_size": 4, "shard_size": 4, "progress": False}
    call = {"num_inference_steps": 2, "guidance_scale": 0.0}
    sample_to_folder(pipeline, ["a", "c"], folder, 6, format=form, **options, **call)
    generator = [image_generator(0, i) for i in range(6)]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(["a", "c"] * 3, generator=generator, output_type="np", **call).images
    images = open_generated(folder)
    assert images.shape == (2, 8) and images.labelled and len(images) == 6
    read = list(images.read(0, 6))
    np.testing.assert_allclose(torch.stack([x for x, _ in read]), expected, rtol=1e-4, atol=1e-3)
    assert [label for _, label in read] == [0, 2] * 3
    # the real data against themselves
    real = open_real(str(write_npy(tmp_path / "data", values, labels)), (2, 8), "train")
    network = load_network(str(tmp_path / "judge"))
    batch = torch.stack([x for x, _ in real.read(0, 5)])
    scaled = (batch - torch.tensor([9.0, -1.0])[:, None]) / torch.tensor([5.0, 0.5])[:, None]
    torch.testing.assert_close(network(batch)[1], network.module(scaled, 0).logits)
    result = evaluate(real, real, network, network, bootstrap=0, progress=False)
    logits = network(torch.stack([x for x, _ in real.read(0, len(real))]))[1]
    ids = torch.tensor([label for _, label in real.read(0, len(real))])
    accuracy = float((logits.argmax(1) == ids).float().mean())
    assert result.metrics["top_1"]["value"] == pytest.approx(accuracy, abs=1e-6)
    with pytest.raises(ValueError, match="format='imagefolder': the pipeline's samples are arrays"):
        sample_to_folder(pipeline, ["a"], tmp_path / "other", 2, format="imagefolder", **options)


def test_fields_of_many_channels_and_volumes(train: Callable[..., Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, shape in (("fields", (5, 8, 8)), ("volumes", (4, 4, 8))):
        for i in range(12):
            (tmp_path / name / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / name / "ab"[i % 2] / f"{i}.npy", generator.normal(size=shape))
    line = "--max_train_steps 1 --lr_warmup_steps 0 --resolution 64"
    fields = f"--train_data_dir {tmp_path / 'fields'}"
    unet = train("unet", f"{line} --class_conditional --data_scale=-4,4", "unet", fields)
    pipeline = ClassifierGuidedPipeline.from_pretrained(unet)
    assert type(pipeline.unet) is UNet2DModel and pipeline.unet.config.in_channels == 5
    assert pipeline.config.data_std == 4 and not pipeline.scheduler.config.clip_sample
    volumes = f"--train_data_dir {tmp_path / 'volumes'} --channel_axis none"
    classifier = NoiseAwareClassifier.from_pretrained(
        train("classifier", line, "classifier", volumes)
    )
    assert classifier.config.dims == 3 and tuple(classifier.config.sample_size) == (4, 4, 8)


def test_streamed_columns_of_arrays_are_refused(train: Callable[..., Path], tmp_path: Path) -> None:
    values, labels = signals()
    features = {"signal": Array2D((2, 8), "float32"), "label": ClassLabel(names=list("abc"))}
    rows = {"signal": list(values), "label": labels}
    (tmp_path / "data").mkdir()
    dataset = Dataset.from_dict(rows, features=Features(features))
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    line = "--max_train_steps 1 --resolution 64 --streaming"
    message = r"--streaming True: False is allowed with arrays \(column 'signal'\)"
    with pytest.raises(SystemExit, match=message):
        train("classifier", line, data=f"--train_data_dir {tmp_path / 'data'}")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("unet", "--class_conditional", r"--class_conditional: .*these arrays are \(2, 8\)"),
        ("classifier", "--random_flip", "--random_flip True: False is allowed with arrays"),
        ("unet", "--streaming", "--streaming True: False is allowed with arrays"),
        ("classifier", "--resolution 16", "--resolution 16: 64 is allowed with arrays"),
        ("classifier", "--data_scale 3", "--data_scale '3': standard"),
        ("unet", "--bits_per_dim_images 5", "--bits_per_dim_images 5: with arrays 0 is allowed"),
    ],
)
def test_options_of_images_are_refused_with_arrays(
    script: str, options: str, message: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_npy(tmp_path / "data", *signals())
    size = "" if "--resolution" in options else "--resolution 64"
    with pytest.raises(SystemExit, match=message):
        train(script, f"--max_train_steps 1 {size} {options}", data=f"--train_data_dir {folder}")
