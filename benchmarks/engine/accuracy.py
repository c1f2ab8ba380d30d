"""What sharing work costs in accuracy: the factored encoder against the plain one, trained alike.

    python benchmarks/engine/accuracy.py simulated --out runs/accuracy [--seeds 0 1 2]
    python benchmarks/engine/accuracy.py naip PATH/TO/naip_pairs [--backbone test_vit] [--on-grid]

`simulated` is the demo's scene: the same pairs, epochs, rates and seeds, another aerial encoder;
windows of 64 px, cells of 16. Spearman's rho to the truth, and windows per second of the engine.

`naip` is a place found again two years later, as in benchmarks/naip_pairs.py: learned on the
places of Santa Monica from scratch, asked for those of Palm Springs; crops of 192 px, cells of 64.
Crops begin anywhere, or with `--on-grid` at multiples of a cell's side, as the windows of maps do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speciesmap.config import load_config, shipped_config
from speciesmap.demo import simulated
from speciesmap.learning.fit import learns_bfloat16
from speciesmap.learning.train import train
from speciesmap.mapping.benchmark import benchmark
from speciesmap.models import Architecture, SpeciesModel
from speciesmap.models.losses import info_nce

sys.path.insert(0, str(Path(__file__).parents[1]))
import naip_pairs as pairs

SCENE_SHAPE = {"cell_px": 16, "width": 96, "layers": 2, "heads": 4}
NAIP_SHAPE = {"cell_px": 64, "width": 96, "layers": 2, "heads": 4}
NAIP_STEPS, NAIP_BATCH, NAIP_LR = 300, 46, 2e-3


def on_scene(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Train both on one simulated landscape and map its species."""
    study = simulated.prepare(out, seed)
    shape = [f"model.aerial.factored.{key}={value}" for key, value in SCENE_SHAPE.items()]
    found = {}
    for name, changes in {
        "plain": [],
        "factored": ["model.aerial.encoder=factored", *shape],
    }.items():
        here = out / name
        start = load_config(shipped_config("demo_crisp.yaml"), [*study.data, *changes])
        tune = [*study.data, f"init={train(start, here / 'pretrained')}"]
        model = train(load_config(shipped_config("demo_finetune.yaml"), tune), here / "model")
        _, maps = simulated.map_taxa(study, model, here)
        speed = benchmark(model, study.landscape.aerial, precision="float32", seconds=5)
        found[name] = {
            **{
                f"rho {way}": rho
                for way, rho in simulated.mean_rho(simulated.measure(study, maps, {})).items()
            },
            "windows/s": speed["windows_per_s"],
        }
    return found


def on_pairs(folder: Path, seed: int, backbone: str, on_grid: bool) -> dict[str, dict[str, float]]:
    """Train both on pairs of years and find the places of another city."""
    step = NAIP_SHAPE["cell_px"] if on_grid else 1
    trained, asked = (pairs.chips(folder, city) for city in pairs.CITIES)
    found = {}
    for name, more in {"plain": {}, "factored": {"factored": NAIP_SHAPE}}.items():
        torch.manual_seed(seed)
        model = SpeciesModel(
            Architecture(
                dim=128,
                bands=("red", "green", "blue", "nir"),
                window_px=pairs.CROP_PX,
                resolution_m=0.6,
                mean=(0.0,) * 4,
                std=(1.0,) * 4,
                aerial={"backbone": backbone, **more},
            )
        )
        learn(model, trained, seed, step)
        model.eval()
        figures = []
        with torch.inference_mode():
            for year in (0, 1):
                rng = np.random.default_rng([seed, year])
                query = pairs.queries(asked[:, year], rng, step)
                place = pairs.gallery(asked[:, 1 - year], step)
                left, right = (
                    torch.cat([model.encode_aerial(pairs.relit(p)) for p in part.split(50)])
                    for part in (query, place)
                )
                figures.append(pairs.retrieve(left, right))
        found[name] = dict(zip(pairs.FIGURES, np.mean(figures, axis=0).tolist(), strict=True))
    return found


def learn(model: SpeciesModel, places: torch.Tensor, seed: int, step: int) -> None:
    """Pull the two years of a place together and all other places away."""
    rng = np.random.default_rng(seed)
    log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    parameters = [*model.aerial.parameters(), log_scale]
    optimiser = torch.optim.AdamW(parameters, lr=NAIP_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, NAIP_LR, total_steps=NAIP_STEPS)
    quick = learns_bfloat16(torch.device("cpu"), model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    for _ in range(NAIP_STEPS):
        some = places[torch.from_numpy(rng.choice(len(places), NAIP_BATCH, replace=False))]
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            left, right = (
                model.encode_aerial(pairs.relit(pairs.queries(some[:, year], rng, step)))
                for year in (0, 1)
            )
        loss = info_nce(left, right, log_scale.exp().clamp(max=100))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Means and standard deviations over seeds in Markdown."""
    figures = list(runs[0]["plain"])
    lines = ["| encoder | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    for name in runs[0]:
        cells = []
        for figure in figures:
            values = np.array([run[name][figure] for run in runs])
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("simulated", "naip"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--backbone", default="test_resnet", help="of naip")
    parser.add_argument("--on-grid", action="store_true", help="crops of naip as maps cut them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        if arguments.what == "naip":
            runs.append(on_pairs(arguments.folder, seed, arguments.backbone, arguments.on_grid))
        else:
            runs.append(on_scene(arguments.out / str(seed), seed))
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    print(f"{len(runs)} seeds\n\n{table(runs)}")


if __name__ == "__main__":
    main()
