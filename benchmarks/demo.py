"""The demo's scenes over several seeds, and what pre-training on pairs is worth.

    python benchmarks/demo.py simulated --out runs/demo --seeds 0 1 2
    python benchmarks/demo.py pretraining --out runs/demo --seeds 0 1 2
    python benchmarks/demo.py sf-bay --out runs/demo --seeds 0 1 2

`simulated` and `sf-bay` run `speciesmap demo --scene NAME` for each seed. A seed of the simulated
scene is another landscape with other niches; one of the Bay scene deals other folds and background,
the presences stay.

`pretraining` asks what the simulated scene's pairs teach: the aerial encoder is frozen after
pre-training, and only the taxa's vectors are learned on it (no photos, no names). It does so for
the true pairs, for pairs whose windows were shuffled between places, and for an encoder that never
trained; and it asks each of the three by photos and by name as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from speciesmap.config import load_config, shipped_config
from speciesmap.demo import sf_bay, simulated
from speciesmap.learning.train import train


def shuffle_windows(chips: Path, out: Path, seed: int) -> None:
    """Copy a paired data set with its windows dealt anew among the rows."""
    (out / "data").mkdir(parents=True)
    for file in chips.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    (source,) = (chips / "data").glob("*.parquet")
    table = pq.read_table(source)
    order = np.random.default_rng(seed).permutation(len(table))
    column = table.column_names.index("rs_image")
    dealt = table.set_column(column, table.schema.field(column), table["rs_image"].take(order))
    groups = pq.ParquetFile(source).metadata
    pq.write_table(dealt, out / "data" / source.name, row_group_size=groups.row_group(0).num_rows)


def simulated_scene(out: Path, seed: int) -> list[dict[str, Any]]:
    """Mean rho by way of asking, and rho of the control and of the withheld species."""
    metrics = simulated.run(out, seed).metrics
    rows = {row["role"]: row for row in metrics["taxa"]}
    control, withheld = rows["control"], rows["withheld"]
    return [
        {
            **metrics["mean_rho"],
            **{f"control {way}": control[f"rho {way}"] for way in simulated.WAYS.values()},
            **{f"withheld {way}": withheld[f"rho {way}"] for way in ("photos", "name")},
        }
    ]


def bay_scene(out: Path, seed: int) -> list[dict[str, Any]]:
    """Area under the ROC curve on held-out blocks, by method, folds pooled."""
    table = sf_bay.run(out, seed).metrics["cross_validation"]
    return [{row["method"]: row["AUC"] for row in table}]


def pretraining(out: Path, seed: int) -> list[dict[str, Any]]:
    """Mean rho of frozen encoders that start from true pairs, shuffled pairs and nothing."""
    study = simulated.prepare(out, seed)
    shuffle_windows(study.chips, out / "shuffled", seed)
    starts = {
        "true pairs": [],
        "shuffled pairs": [f"data.dataset={out / 'shuffled'}"],
        "no training": ["optim.epochs=1", "optim.lr=1e-12"],
    }
    table = []
    for name, changes in starts.items():
        here = out / name.replace(" ", "_")
        start = train(
            load_config(shipped_config("demo_crisp.yaml"), [*study.data, *changes]), here / "start"
        )
        probe = [*study.data, f"init={start}", "freeze_encoder=true", "align=0"]
        folder = train(load_config(shipped_config("demo_finetune.yaml"), probe), here / "model")
        _, maps = simulated.map_taxa(study, folder, here)
        table.append({"start": name, **simulated.mean_rho(simulated.measure(study, maps, {}))})
    return table


MEASURES = {"simulated": simulated_scene, "pretraining": pretraining, "sf-bay": bay_scene}


def main() -> None:
    """Run, and print JSON lines as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for row in MEASURES[arguments.measure](arguments.out / f"{arguments.measure}-{seed}", seed):
            rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps({"seed": seed, **rounded}), flush=True)


if __name__ == "__main__":
    main()
