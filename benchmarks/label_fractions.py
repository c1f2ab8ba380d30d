"""How many labels each pre-training saves, on a simulated scene: one table and one plot.

    python benchmarks/label_fractions.py --out runs/label_fractions

CRISP, CVE-MAE and CVM-MAE learn from the pairs of one simulated landscape without labels, with the
same two small transformers, the same batches and as many epochs. Then photo and window together
name the taxon, fine-tuned with 1, 5, 20 and 100 percent of the labels; so does a copy that never
saw anything ("supervised only"). Every seed deals blocks of 150 m anew to training, validation and
testing. The pairs of test blocks are among those of pre-training, without their labels, for all
three methods alike.

Steps that are done are not repeated: what is slow can be run in pieces with `--only`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from speciesmap.config import ClassifyConfig, PretrainConfig, load_config
from speciesmap.datasets.chips import make_chips
from speciesmap.learning.classify import classify, read_results
from speciesmap.learning.data import PairedRows, open_sources
from speciesmap.learning.train import build, train
from speciesmap.models import save_model
from speciesmap.observations.read import read_observations
from speciesmap.rasters.imagery import open_imagery
from speciesmap.simulate import simulate

RESULTS = Path(__file__).parent / "results"
SIDE_PX = 64
VIT = {
    "backbone": "vit_tiny_patch16_224",
    "kwargs": {"patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3},
}
METHODS = {"CRISP": "crisp", "CVE-MAE": "cve_mae", "CVM-MAE": "cvm_mae"}
SUPERVISED = "supervised only"
PERCENT = [1.0, 5.0, 20.0, 100.0]
BLOCK_M = 150


def pretraining(chips: Path, method: str, epochs: int) -> PretrainConfig:
    """Configuration of one method; all share towers, batches and schedule."""
    config = load_config(
        {
            "stage": "pretrain",
            "method": method,
            "data": {"dataset": str(chips)},
            "model": {"dim": 96, "aerial": VIT, "ground": {**VIT, "image_px": SIDE_PX}},
            "masked": {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4},
            "crossview": {"freeze_aerial": False},
            "optim": {"epochs": epochs, "batch_size": 64, "lr": 0.001},
            "trainer": {"accelerator": "cpu", "devices": 1},
        }
    )
    assert isinstance(config, PretrainConfig)
    return config


def prepare(out: Path, size_px: int) -> Path:
    """Simulate a landscape and cut chips of all its observations."""
    chips = out / "chips"
    if not chips.exists():
        scene = simulate(out / "scene", size_px=size_px, seed=0)
        make_chips(
            read_observations(scene.observations),
            open_imagery(scene.aerial),
            chips,
            window_px=SIDE_PX,
            photos=scene.photos,
        )
    return chips


def start(out: Path, chips: Path, name: str, epochs: int) -> Path:
    """Pre-train by a method, or save a model that learned nothing."""
    folder = out / name.replace(" ", "_")
    if folder.exists():
        return folder
    if name != SUPERVISED:
        return train(pretraining(chips, METHODS[name], epochs), folder, resume=True)
    config = pretraining(chips, "crisp", epochs)
    sources = open_sources(config.data)
    assert sources.dataset is not None
    rows = PairedRows(sources.dataset, sources.rows, sources.taxa, SIDE_PX)
    return save_model(build(config.model, sources, rows), folder, {"metrics": {}})


def compare(out: Path, chips: Path, name: str, model: Path, seed: int, epochs: int) -> pd.DataFrame:
    """Fine-tune one start with every share of the labels, for one deal of the blocks."""
    folder = out / f"seed_{seed}" / name.replace(" ", "_")
    config = load_config(
        {
            "stage": "classify",
            "init": str(model),
            "seed": seed,
            "data": {"dataset": str(chips)},
            "splits": {"block_m": BLOCK_M},
            "views": ["both"],
            "modes": ["finetune"],
            "percent": PERCENT,
            "patience": epochs,
            "optim": {"epochs": epochs, "batch_size": 64, "lr": 0.0005},
            "trainer": {"accelerator": "cpu", "devices": 1},
        }
    )
    assert isinstance(config, ClassifyConfig)
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        classify(config, folder)
    return pd.DataFrame(read_results(folder)["table"]).assign(init=name, seed=seed)


def plot(table: pd.DataFrame, file: Path) -> None:
    """Draw mean and standard deviation over seeds against the share of labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    colors = ("#0072b2", "#d55e00", "#009e73", "#555555")  # Okabe & Ito 2008
    for (name, rows), color, marker in zip(
        table.groupby("init", sort=False), colors, "os^x", strict=True
    ):
        axes.errorbar(
            rows["labels"],
            rows["mean"],
            rows["sd"],
            label=name,
            color=color,
            marker=marker,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.set_xlabel("labelled training rows (1, 5, 20 and 100 percent)")
    axes.set_ylabel("species-averaged top-1 on test blocks")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, by start and share."""
    table = rows.groupby(["init", "percent"], sort=False).agg(
        labels=("labels", "mean"),
        mean=("species_top1", "mean"),
        sd=("species_top1", "std"),
        seeds=("species_top1", "size"),
    )
    return table.reset_index().round({"labels": 0, "mean": 3, "sd": 3})


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size-px", type=int, default=2048)
    parser.add_argument("--pretrain-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", choices=[*METHODS, SUPERVISED])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where table and plot go")
    arguments = parser.parse_args()
    out: Path = arguments.out
    chips = prepare(out, arguments.size_px)
    wanted = [arguments.only] if arguments.only else [*METHODS, SUPERVISED]
    models = {name: start(out, chips, name, arguments.pretrain_epochs) for name in wanted}
    if arguments.only:
        return
    results = [
        compare(out, chips, name, path, seed, arguments.epochs)
        for seed in range(arguments.seeds)
        for name, path in models.items()
    ]
    table = summarise(pd.concat(results))
    arguments.results.mkdir(exist_ok=True)
    table.to_csv(arguments.results / "label_fractions.csv", index=False)
    plot(table, arguments.results / "label_fractions.png")
    print(table.pivot(index="percent", columns="init", values=["mean", "sd"]).to_string())


if __name__ == "__main__":
    main()
