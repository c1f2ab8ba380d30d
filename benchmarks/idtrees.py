"""What hyperspectral crowns teach a network that will see RGB alone.

IDTReeS 2020, site MLBS: crowns of trees of known species, each seen in RGB (0.1 m) and in 369
hyperspectral bands (1 m). Folds are whole plots, five of them; species of eleven crowns or more,
ten of them. Everything is learned on the training plots of a fold; the other view is absent when
held-out crowns are classified from what a network makes of their RGB: 40 principal components and
logistic regression, a probe that was chosen on the spectra alone.

Every network is a small perceptron on the same description of a crown's RGB: tones and responses to
random filters, averaged over the filters' four turns, because some 650 crowns teach no more than
that. It is pre-trained on crowns and random windows of the training plots: by CRISP's loss between
RGB and spectrum, or between two random views of RGB alone (SimCLR, Chen et al. 2020). Nothing of
the pre-training was tuned on the figures.

With five seeds (`results/idtrees.csv` and `.png`; mean and standard deviation) RGB alone reaches
0.585 ± 0.041 without pre-training, 0.595 ± 0.042 pre-trained on RGB, 0.605 ± 0.042 with spectra as
the other view; spectra reach 0.729 ± 0.056. By seed, CRISP is over no pre-training by
0.020 ± 0.022 and over RGB alone by 0.010 ± 0.020, with four seeds of five each: a small gain, at
the margin of what five seeds can show.

    python benchmarks/idtrees.py PATH/TO/idtrees_mlbs --out FOLDER [--seeds 5]

Each seed draws folds, filters, windows and weights anew; one that is in FOLDER is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from speciesmap.models.losses import info_nce
from speciesmap.rasters.imagery import open_imagery

FOLDS, FEWEST = 5, 11
PLOT_M, RGB_PX, HSI_PX = 20, 200, 20
SIDE_PX = 40  # what a crown's RGB is resampled to
WINDOWS, VIEWS = 15, 4  # random windows of a plot, and random views of each crown and window
WATER = ((190, 212), (280, 315), (355, 369))  # noisy bands, by position


@dataclass(frozen=True)
class Crowns:
    """Windows of plots in both views.

    Attributes:
        described: RGB of random views, the first without augmentation, shape (V, N, F).
        spectrum: Mean reflectance, shape (N, S).
        plot: Of each, shape (N,).
        species: Position in `names`, -1 for a random window or a rare species, shape (N,).
        names: Of the species.
    """

    described: Tensor
    spectrum: Tensor
    plot: NDArray[np.int64]
    species: NDArray[np.int64]
    names: tuple[str, ...]


def read(folder: Path, seed: int) -> Crowns:
    """Read crowns, and random windows of 4 m beside them.

    Args:
        folder: Holds `RemoteSensing`, `ITC` and `Field`.
        seed: Of filters, random windows and random views.
    """
    rng = np.random.default_rng(seed)
    boxes = gpd.read_file(folder / "ITC" / "train_MLBS.shp")
    field = pd.read_csv(folder / "Field" / "train_data.csv").drop_duplicates("indvdID")
    boxes = boxes.merge(field[["indvdID", "taxonID"]], on="indvdID", how="left")
    counts = boxes["taxonID"].value_counts()
    names = tuple(sorted(counts.index[counts >= FEWEST]))
    describe = Describe(32, seed)
    parts, spectra, plots, species = [], [], [], []
    for number in range(1, 47):
        rgb = open_imagery(str(folder / "RemoteSensing" / "RGB" / f"MLBS_{number}.tif"))
        hsi = open_imagery(str(folder / "RemoteSensing" / "HSI" / f"MLBS_{number}.tif"))
        colour = torch.from_numpy(np.array(rgb.read(0, 0, RGB_PX, RGB_PX)[0], np.float32))
        cube = np.array(hsi.read(0, 0, HSI_PX, HSI_PX)[0], np.float32)
        left, top = rgb.geobox.transform * (0, 0)
        middle = boxes.geometry.centroid
        inside = (middle.x - left).between(0, PLOT_M) & (top - middle.y).between(0, PLOT_M)
        places = []  # row, column and half side in metres, and species
        for _, box in boxes[inside].iterrows():
            west, south, east, north = box.geometry.bounds
            half = float(np.clip(max(east - west, north - south) / 2, 1.0, 6.0))
            known = names.index(box["taxonID"]) if box["taxonID"] in names else -1
            places.append((top - (south + north) / 2, (west + east) / 2 - left, half, known))
        places += [(*rng.uniform(2, 18, 2), 2.0, -1) for _ in range(WINDOWS)]
        views = [
            crop(colour, row, col, half, rng if view else None)
            for view in range(VIEWS)
            for row, col, half, _ in places
        ]
        parts.append(describe(torch.stack(views)).reshape(VIEWS, len(places), -1))  # (V, n, F)
        for row, col, half, known in places:
            low = [max(0, min(HSI_PX - 1, round(at - half))) for at in (row, col)]
            high = [
                max(start + 1, min(HSI_PX, round(at + half)))
                for start, at in zip(low, (row, col), strict=True)
            ]
            spectra.append(cube[:, low[0] : high[0], low[1] : high[1]].mean((1, 2)))
            plots.append(number)
            species.append(known)
    clean = np.ones(cube.shape[0], bool)
    for first, end in WATER:
        clean[first:end] = False
    spectrum = np.stack(spectra)[:, clean]
    return Crowns(
        torch.cat(parts, 1),
        torch.from_numpy(spectrum / 10_000),
        np.array(plots),
        np.array(species),
        names,
    )


def crop(
    colour: Tensor, row: float, col: float, half: float, rng: np.random.Generator | None
) -> Tensor:
    """Cut a square about a place, in metres, out of a plot (3, 200, 200); shape (3, P, P).

    With a source of randomness its place, size, turn and light vary.
    """
    gain = torch.ones(3, 1, 1)
    if rng is not None:
        row, col = row + rng.normal(0, 0.15 * half), col + rng.normal(0, 0.15 * half)
        half *= float(rng.uniform(0.7, 1.1))
        gain *= float(np.exp(rng.normal(0, 0.1)))
        gain *= torch.from_numpy(np.exp(rng.normal(0, 0.03, (3, 1, 1))).astype(np.float32))
    scale = RGB_PX / PLOT_M
    top, left = (max(0, round((at - half) * scale)) for at in (row, col))
    bottom, right = (min(RGB_PX, round((at + half) * scale)) for at in (row, col))
    top, left = min(top, bottom - 4), min(left, right - 4)
    window = colour[None, :, max(0, top) : bottom, max(0, left) : right]
    return F.interpolate(window, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)[0] * gain


class Describe:
    """Tones and textures of crowns that turning does not change."""

    def __init__(self, filters: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(filters, 3, 5, 5, generator=g) / 6
        weight = weight - weight.mean((2, 3), keepdim=True)
        self.weight = torch.cat([torch.rot90(weight, k, (2, 3)) for k in range(4)])

    def __call__(self, images: Tensor) -> Tensor:
        """Describe images (N, 3, P, P), shape (N, F)."""
        images = images / 64 - 2
        parts = []
        for _ in range(3):
            response = F.conv2d(images, self.weight).abs()
            response = response.reshape(len(images), 4, -1, *response.shape[2:])  # (N, 4, F, h, w)
            bands = images.flatten(2)
            parts += [
                response.mean((1, 3, 4)).log1p(),
                bands.mean(2),
                bands.std(2),
                (bands @ bands.mT / bands.shape[2]).flatten(1),
            ]
            images = F.avg_pool2d(images, 2)
        return torch.cat(parts, 1)


def perceptron(inputs: int, dim: int = 64) -> nn.Module:
    """Two layers, whose first is what is kept of a pre-trained network."""
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, dim)
    )


def pretrain(
    described: Tensor, other: Tensor | None, seed: int, steps: int = 400, size: int = 256
) -> nn.Module:
    """Pre-train on RGB with the spectra as the other view, or with RGB's own other views.

    Args:
        described: Standardised, shape (V, N, F).
        other: Standardised spectra, shape (N, S).
        seed: Of weights and draws.
        steps: Of AdamW.
        size: Of a batch.
    """
    torch.manual_seed(seed)
    count = described.shape[1]
    left = perceptron(described.shape[2])
    right = left if other is None else perceptron(other.shape[1])
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    towers = nn.ModuleList([left] if other is None else [left, right])
    optimiser = torch.optim.AdamW([*towers.parameters(), log_scale], lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(count)[:size]
        first, second = torch.randint(VIEWS, (2, len(rows)))
        one = left(described[first, rows])
        two = left(described[second, rows]) if other is None else right(other[rows])
        scale = log_scale.exp().clamp(max=100)
        loss = info_nce(F.normalize(one, dim=1), F.normalize(two, dim=1), scale)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return left.eval()


@torch.no_grad()
def kept(network: nn.Module, described: Tensor) -> NDArray[np.float32]:
    """What the first layer and the joint space make of RGB, shape (N, 256 + 64)."""
    hidden = network[:3](described)  # type: ignore[index]
    joint = F.normalize(network(described), dim=1) * 4
    return np.asarray(torch.cat([hidden, joint], 1))


def folds_of(crowns: Crowns, seed: int) -> NDArray[np.int64]:
    """Fold of each row by whole plots, balanced on labelled crowns, shape (N,)."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.unique(crowns.plot))
    sizes = {n: int(((crowns.plot == n) & (crowns.species >= 0)).sum()) for n in numbers}
    total, fold = np.zeros(FOLDS), {}
    for number in sorted(numbers, key=lambda n: -sizes[n]):
        fold[number] = int(total.argmin())
        total[fold[number]] += sizes[number] + 1e-3
    return np.array([fold[number] for number in crowns.plot])


def run(crowns: Crowns, seed: int) -> dict[str, float]:
    """Macro AUC over species of held-out crowns' pooled probabilities, by way of learning."""
    fold = folds_of(crowns, seed)
    known = crowns.species >= 0
    label = crowns.species[known]
    scores: dict[str, NDArray[np.float64]] = {}
    for k in range(FOLDS):
        train, test = fold != k, known & (fold == k)
        rgb, spectrum = crowns.described, crowns.spectrum
        rgb = (rgb - rgb[:, train].mean((0, 1))) / (rgb[:, train].std((0, 1)) + 1e-6)
        spectrum = F.normalize(spectrum, dim=1)
        spectrum = (spectrum - spectrum[train].mean(0)) / (spectrum[train].std(0) + 1e-6)
        torch.manual_seed(seed)
        untrained = perceptron(rgb.shape[2]).eval()
        crisp = pretrain(rgb[:, train], spectrum[train], seed)
        alone = pretrain(rgb[:, train], None, seed)
        seen = {
            "RGB, description": rgb[0].numpy(),
            "RGB, no pre-training": kept(untrained, rgb[0]),
            "RGB, pre-trained on RGB alone": kept(alone, rgb[0]),
            "RGB, CRISP with spectra": kept(crisp, rgb[0]),
            "RGB, CRISP and description": np.c_[rgb[0].numpy(), kept(crisp, rgb[0])],
            "spectra": spectrum.numpy(),
        }
        for name, features in seen.items():
            model = make_pipeline(
                StandardScaler(),
                PCA(40, whiten=True, random_state=seed),
                LogisticRegression(max_iter=200),
            )
            model.fit(features[known & train], crowns.species[known & train])
            part = scores.setdefault(name, np.zeros((len(known), len(crowns.names))))
            part[np.ix_(test, model[-1].classes_)] = model.predict_proba(features[test])
    return {
        name: float(np.mean([roc_auc_score(label == t, part[known][:, t]) for t in set(label)]))
        for name, part in scores.items()
    }


def plot(table: pd.DataFrame, file: Path) -> None:
    """Draw mean and standard deviation over seeds, and every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for y, name in enumerate(table.columns[::-1]):
        color = "#d55e00" if "CRISP" in name else "#555555" if "RGB" in name else "#0072b2"
        values = table[name]
        axes.plot(values, np.full(len(values), y), "o", color=color, alpha=0.3, markersize=4)
        axes.errorbar(values.mean(), y, xerr=values.std(), fmt="s", color=color, capsize=4)
    axes.set_yticks(range(table.shape[1]), table.columns[::-1])
    axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"macro AUC on held-out plots (mean and deviation of {len(table)} seeds)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run the seeds that are not done; print one table, write it and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(arguments.seeds):
        done = out / f"seed_{seed}.json"
        if not done.exists():
            figures = run(read(arguments.folder, seed), seed)
            done.write_text(json.dumps(figures, indent=1))
        runs.append(json.loads(done.read_text()))
    table = pd.DataFrame(runs)
    table.index.name = "seed"
    print("| from | macro AUC | less no pre-training, by seed |\n|---|---|---|")
    for name in table:
        gain = table[name] - table["RGB, no pre-training"]
        print(
            f"| {name} | {table[name].mean():.3f} ± {table[name].std():.3f} "
            f"| {gain.mean():+.3f} ± {gain.std():.3f} |"
        )
    table.round(4).to_csv(out / "idtrees.csv")
    plot(table, out / "idtrees.png")


if __name__ == "__main__":
    main()
