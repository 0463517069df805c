"""Signals instead of images: MNIST-1D, ten classes of curves of 40 samples.

    pip install mnist1d    # generates the data (Greydanus & Kobak 2024, "Scaling down deep learning
                           # with MNIST-1D")
    python examples/mnist1d_signals.py --output out/mnist1d --picture examples/figures/mnist1d.png

Trains an unconditional network, a noise-aware classifier and a judge with the scripts of training/,
in about ten minutes of a CPU core; what is trained already is not trained again. Then it samples
every class without and with guidance, has the judge say of which class each curve is, and draws
curves. All curves are written to npz files, with labels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.assembly import assembled
from guided_diffusers.evaluation import load_network
from guided_diffusers.sampling import sample

TRAINING = Path(__file__).parents[1] / "training"
UNET = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownResnetBlock1D"] * 3,
    "up_block_types": ["UpResnetBlock1D"] * 2,
    "mid_block_type": "MidResTemporalBlock1D",
    "out_block_type": "OutConv1DBlock",
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "act_fn": "mish",
}
CLASSIFIER = {
    "block_out_channels": [32, 48, 64],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
#: script, config, steps and further options of each network
PARTS = {
    "judge": ("train_classifier.py", CLASSIFIER, 600, "--learning_rate 2e-3 --max_timestep 0"),
    "classifier": ("train_classifier.py", CLASSIFIER, 6000, "--learning_rate 3e-3"),
    "unet": (
        "train_unet.py",
        UNET,
        3000,
        "--learning_rate 2e-3 --sample_images 0 --prediction_type v_prediction",
    ),
}


def write_data(folder: Path, count: int) -> None:
    """train.parquet and test.parquet, with the columns `signal` (40 numbers) and `label`."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise SystemExit("the data need a package: pip install mnist1d") from error
    from datasets import ClassLabel, Dataset, Features, List, Value

    arguments = get_dataset_args()
    arguments.num_samples = count
    data = make_dataset(arguments)
    names = ClassLabel(names=[str(digit) for digit in range(10)])
    features = Features({"signal": List(Value("float32")), "label": names})
    for split, suffix in (("train", ""), ("test", "_test")):
        rows = {"signal": data[f"x{suffix}"].astype(np.float32), "label": data[f"y{suffix}"]}
        dataset = Dataset.from_dict({name: list(rows[name]) for name in rows}, features=features)
        dataset.to_parquet(folder / f"{split}.parquet")


def train(part: str, options: argparse.Namespace) -> Path:
    """The folder of a trained network."""
    folder = options.output / part
    script, config, steps, more = PARTS[part]
    if (folder / "metrics.json").is_file():
        return folder
    config_file = options.output / f"{part}.json"
    config_file.write_text(json.dumps(config))
    line = f"--train_batch_size 64 --lr_scheduler cosine --lr_warmup_steps 50 {more}"
    line += " --validation_samples 500" + (" --diagnosis_images 0" if part != "unet" else "")
    line += (
        f" --validation_steps 0 --max_train_steps {options.steps or steps} --seed {options.seed}"
    )
    command = [sys.executable, str(TRAINING / script), *line.split()]
    command += ["--train_data_dir", str(options.output / "data"), "--output_dir", str(folder)]
    command += ["--model_config_name_or_path", str(config_file)]
    command += [] if torch.cuda.is_available() else ["--cpu"]
    subprocess.run(command, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    return folder


def sampled(
    pipeline: ClassifierGuidedPipeline, options: argparse.Namespace, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Curves (N, 1, 40) of all classes in turn, in the data's units, and their labels."""
    labels = [i % 10 for i in range(10 * options.per_class)]
    call = {"guidance_scale": scale, "num_inference_steps": options.num_inference_steps}
    batches = sample(pipeline, labels, options.seed, 250, output_type="np", **call)
    return np.concatenate([curves for _, curves in batches]), np.array(labels)


def draw(rows: dict[str, tuple[np.ndarray, np.ndarray]], path: Path, each: int = 4) -> None:
    """A picture: a column a class, a row a kind of curves, `each` curves in a panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 10, sharex=True, sharey=True, squeeze=False)
    for (name, (curves, labels)), row in zip(rows.items(), panels, strict=True):
        row[0].set_ylabel(name)
        for digit, panel in enumerate(row):
            panel.plot(curves[labels == digit][:each, 0].T, linewidth=1)
            panel.set(xticks=[], yticks=[], ylim=(-4, 4))
    for digit, panel in enumerate(panels[0]):
        panel.set_title(f"class {digit}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/mnist1d"), help="folder")
    parser.add_argument("--picture", type=Path, default=Path("mnist1d.png"))
    parser.add_argument(
        "--examples", type=int, default=50_000, help="of the data, 80%% to train on"
    )
    parser.add_argument("--steps", type=int, help="of each training (default: as in PARTS)")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 3.0, 5.0, 10.0])
    parser.add_argument("--per-class", type=int, default=100, help="curves of each class")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # 1. Data
    data = options.output / "data"
    if not (data / "test.parquet").is_file():
        data.mkdir(parents=True, exist_ok=True)
        write_data(data, options.examples)

    # 2. Trainings
    folders = {part: train(part, options) for part in PARTS}

    # 3. Curves of each class, and what the judge says of them
    pipeline = assembled(folders["unet"], folders["classifier"])
    pipeline.set_progress_bar_config(disable=True)
    judge, test = load_network(folders["judge"]), read_test(data / "test.parquet")
    rows = {"data": test} | {f"scale {s:g}": sampled(pipeline, options, s) for s in options.scales}
    for name, (curves, labels) in rows.items():
        with torch.no_grad():
            predicted = judge(torch.from_numpy(curves))[1].argmax(1).numpy()
        agreement = float((predicted == labels).mean())
        print(f"{name:>10}: the judge agrees on {agreement:.1%} of {len(labels)} curves")
        np.savez(options.output / f"{name.replace(' ', '-')}.npz", curves, labels)
    draw(rows, options.picture)


def read_test(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Held-out curves (N, 1, 40) and their labels."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(path)).with_format("numpy")
    return rows["signal"][:][:, None].astype(np.float32), rows["label"][:]


if __name__ == "__main__":
    main()
