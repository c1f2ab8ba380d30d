"""Commands stopped at random moments: what then has the output's name is old or new, and whole.

    python tests/interruptions.py [COMMAND...] --moments 50 [--seed N]

Each command is run in a process of its own and gets SIGKILL, SIGTERM or SIGINT after a random
time, with an old result present and without one. Afterwards every file of the output must be that
of the old result or every one that of the new one, byte for byte but for those that tell the time;
or there is no output where there was none. An embedding store is filled in place where there was
none: each of its tiles must be absent or that of the whole store. SIGTERM and SIGINT leave nothing
hidden beside it but what a next run goes on from.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from forks import ended, start
from sklearn.decomposition import PCA
from tiny import BANDS, TAXA, tiny_model, tiny_scene

from speciesmap import cli
from speciesmap.config import load_config
from speciesmap.demo import simulated
from speciesmap.describe import describe
from speciesmap.mapping import umap
from speciesmap.models import save_model
from speciesmap.simulate import simulate

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RESUMED = (".training", ".windows", ".fresh.zarr")
"""Ends of the names of what a next run goes on from."""

TIMED = re.compile(r"\.\d{9,}\..*")
"""What the names of TensorBoard's files say of time, machine and process."""

COMMANDS = (
    "observations", "chips", "train pretrain", "train finetune", "evaluate", "embed", "predict",
    "map", "umap", "simulate", "demo",
)  # fmt: skip

State = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A command to stop.

    Attributes:
        calls: Words of two calls with different results, without `--out`.
        out: Name of its output, in a folder of its own.
        patched: Which of `PATCHES` stands in for slow parts meanwhile.
        partial: Whether an output that was not there may hold a part of the whole.
    """

    calls: tuple[Sequence[Any], Sequence[Any]]
    out: str
    patched: str = ""
    partial: bool = False


def cases(folder: Path) -> dict[str, Case]:
    """Every command that writes, on small inputs made here."""
    scene = tiny_scene(folder, rows=60)
    other = tiny_scene(folder / "other", rows=24)
    base = tiny_model()
    base.architecture.__dict__["bands"] = BANDS
    base = save_model(base, folder / "base", {})
    settings: dict[str, Any] = {
        "stage": "finetune",
        "init": str(base),
        "data": {"dataset": str(scene.chips), "imagery": str(scene.imagery), "background": 120},
        "validation": {"folds": 2, "block_m": 40},
        "optim": {"epochs": 2, "batch_size": 16},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
    }
    pretrain = {
        "stage": "pretrain",
        "data": {"dataset": str(scene.chips)},
        "model": {"dim": 16, "aerial": {"backbone": "test_resnet"}, "text": {"width": 16}},
        **{key: settings[key] for key in ("optim", "trainer")},
    }
    for name, content in (("finetune", settings), ("pretrain", pretrain)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    tuned = tiny_model()
    tuned.architecture.__dict__["bands"] = BANDS
    model = save_model(tuned, folder / "model", {"training": settings})
    rows = "".join(
        f"{k},{TAXA[k % 3].name},{37.4 + k % 97 / 1e3:.4f},{-122 - k % 89 / 1e3:.4f},2020-01-02\n"
        for k in range(3000)
    )
    for name, part in (("few", rows[:40_000]), ("many", rows)):
        (folder / f"{name}.csv").write_text(f"id,species,latitude,longitude,date\n{part}")
    run(["embed", model, "--imagery", scene.imagery, "--out", folder / "store.zarr", "-q"])
    run(["embed", model, "--imagery", other.imagery, "--out", folder / "small.zarr", "-q",
         "--stride-px", "16"])  # fmt: skip
    records = folder / "records.csv"
    records.write_text(places(scene.imagery))
    run(["observations", records, "--out", folder / "records.parquet", "-q"])
    predict = ["predict", model, "--store", folder / "store.zarr", "--qgis-project", "--species"]
    make = ["chips", folder / "records.parquet", "--imagery", scene.imagery, "--window-px"]
    maps = [[*predict[:4], "--species", taxon.name] for taxon in TAXA[:2]]
    for k, words in enumerate(maps):
        run([*words, "--out", folder / f"maps{k}", "-q"])
    tifs = [next((folder / f"maps{k}").glob("*.tif")) for k in range(2)]
    train = [["train", folder / f"{name}.yaml"] for name in ("pretrain", "finetune")]
    return {
        "observations": Case(
            (["observations", folder / "few.csv"], ["observations", folder / "many.csv"]),
            "observations.parquet",
        ),
        "chips": Case(([*make, "16"], [*make, "24"]), "chips"),
        "train pretrain": Case((train[0], [*train[0], "--set", "seed=1"]), "run"),
        "train finetune": Case((train[1], [*train[1], "--set", "seed=1"]), "run"),
        "evaluate": Case(
            (
                ["evaluate", model, "--data", folder / "finetune.yaml"],
                ["evaluate", model, "--data", other.chips],
            ),
            "evaluation",
        ),
        "embed": Case(
            (
                ["embed", model, "--imagery", scene.imagery, "--stride-px", "3"],
                ["embed", model, "--imagery", scene.imagery, "--stride-px", "2"],
            ),
            "store.zarr",
            partial=True,
        ),
        "predict": Case(
            ([*predict, TAXA[0].name], [*predict, TAXA[1].name, "--species", TAXA[2].name]), "maps"
        ),
        "map": Case((["map", tifs[0]], ["map", *tifs]), "map.html"),
        "umap": Case(
            (["umap", folder / "small.zarr"], ["umap", folder / "store.zarr"]),
            "colours.tif",
            patched="umap",
        ),
        "simulate": Case(
            tuple(
                ["simulate", "--size-px", "512", "--species", "3", "--seed", seed] for seed in "01"
            ),  # type: ignore[arg-type]
            "scene",
        ),
        "demo": Case(
            tuple(["demo", "--scene", "simulated", "--seed", seed] for seed in "01"),  # type: ignore[arg-type]
            "demo",
            patched="demo",
        ),
    }


def principal_axes(vectors: Any, dimensions: int, *_: object) -> Any:
    """Stand in for UMAP."""
    return PCA(dimensions).fit_transform(vectors)


def places(imagery: Path) -> str:
    """Records on a scene, as a table."""
    from speciesmap.rasters.imagery import open_imagery

    rng = np.random.default_rng(0)
    x, y = open_imagery(imagery).xy(*rng.integers(20, 140, (2, 200)) + 0.5)
    rows = (
        f"{k},{TAXA[k % 3].name},{b:.7f},{a:.7f}\n"
        for k, (a, b) in enumerate(zip(x, y, strict=True))
    )
    return "id,species,latitude,longitude\n" + "".join(rows)


def run(words: Sequence[Any]) -> int:
    """Run the command line here and give its exit status."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


PATCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "umap": lambda: patch.object(umap, "fit_umap", principal_axes),  # UMAP compiles itself
    "demo": lambda: patch.multiple(
        simulated,
        simulate=partial(simulate, size_px=512, species=3),
        load_config=lambda source, changes=(): load_config(source, [*changes, "optim.epochs=1"]),
    ),
}


def work(words: Sequence[str], patched: str) -> None:
    """Run the command line, in a process of its own."""
    with PATCHES[patched]():
        sys.exit(run(words))


def begin(words: Sequence[Any], patched: str) -> BaseProcess:
    """Run the command line in a process of its own."""
    from interruptions import work  # as the server knows it, also where this is `__main__`

    return start(work, [str(word) for word in words], patched)


def state(out: Path) -> State:
    """A hash of every file of an output: of a folder, or of all files of one stem."""
    files = out.rglob("*") if out.is_dir() else out.parent.glob(f"{out.stem}.*")
    return {
        TIMED.sub("", str(file.relative_to(out.parent))): hashlib.sha256(
            file.read_bytes()
        ).hexdigest()
        for file in files
        if file.is_file()
    }


def copied(source: Path, folder: Path) -> None:
    """Let a folder hold what another holds."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)


@dataclass
class Whole:
    """What a call gives when nothing stops it.

    Attributes:
        folder: Holds its output.
        files: Hash of each file; of those that tell the time, nothing.
        seconds: How long it took.
    """

    folder: Path
    files: State
    seconds: float


def whole(words: Sequence[Any], case: Case, place: Path, folder: Path) -> Whole:
    """Run a call twice to its end in a place, and keep what is there then in a folder."""
    states, seconds = [], 0.0
    for _ in range(2):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        began = time.perf_counter()
        status = ended(
            begin([*words, "--out", place / case.out, "--overwrite", "-q"], case.patched)
        )
        assert status == 0, (words, status)
        seconds = time.perf_counter() - began
        states.append(state(place / case.out))
        time.sleep(1.1)  # so that what tells the second differs
    copied(place, folder)
    one, other = states
    assert set(one) == set(other) and one
    return Whole(folder, {k: v if other[k] == v else "" for k, v in one.items()}, seconds)


def is_new(found: State, new: Whole) -> bool:
    """Tell whether an output is that of a call, whole."""
    return set(found) == set(new.files) and all(
        wanted in ("", found[name]) for name, wanted in new.files.items()
    )


def stop_at_random(
    case: Case, moments: int, seed: int, folder: Path
) -> tuple[Counter[str], list[str]]:
    """Stop a command again and again.

    Args:
        case: The command.
        moments: How many.
        seed: Of the moments.
        folder: To work in.

    Returns:
        How many moments left the old result, the new one, a part that a next run goes on from,
        or nothing where there was nothing; and what is broken.
    """
    rng = random.Random(seed)
    place = folder / "place"
    old, new = (whole(w, case, place, folder / f"whole{k}") for k, w in enumerate(case.calls))
    assert old.files != new.files
    out = place / case.out
    outcome: Counter[str] = Counter()
    broken = []
    for moment in range(moments):
        by, present = SIGNALS[moment % 3], moment // 3 % 2 == 0
        if present:
            copied(old.folder, place)
        else:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        before = state(out)
        words = [*case.calls[1], "--out", out, "--overwrite", "-q"]
        after_s = rng.uniform(0, 1.1 * new.seconds)
        child = begin(words, case.patched)
        time.sleep(after_s)
        if child.is_alive():
            os.kill(child.pid or 0, by)
        status = ended(child)
        found = state(out)
        what = f"{by.name} after {after_s:.3f} s, {'an' if present else 'no'} old result"
        beside = {p.name for p in place.iterdir() if p.name.startswith(".")}
        if found == before:
            outcome["old" if present else "nothing"] += 1
        elif is_new(found, new):
            outcome["new"] += 1
            describe(out) if case.partial else None
        elif case.partial and not present and describe(out)["kind"] == "store":
            chunks = {name for name in found if "/c/" in name}
            same = all(found[name] == new.files.get(name) for name in chunks)
            outcome["part"] += 1
            if not same:
                broken.append(f"{what}: a tile is not the whole store's")
        else:
            differing = [n for n in {*found, *new.files} if found.get(n) != new.files.get(n)]
            broken.append(f"{what}: neither old nor new, {sorted(differing)[:5]}")
        if by is not signal.SIGKILL and status != 0:
            left = [name for name in beside if not name.endswith(RESUMED)]
            broken += [f"{what}: left {left}"] if left else []
        if by is signal.SIGKILL and moment % 5 == 0:  # what lies about is in no one's way
            status = ended(begin(words, case.patched))
            if status or not is_new(state(out), new):
                broken.append(f"{what}: run again it ended with {status}")
    return outcome, broken


def main() -> None:
    """Stop commands by name and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found = cases(folder / "inputs")
        for name in arguments.commands or COMMANDS:
            began = time.perf_counter()
            outcome, broken = stop_at_random(
                found[name], arguments.moments, arguments.seed, folder / name
            )
            seconds = time.perf_counter() - began
            print(f"{name}: {dict(outcome)}, broken: {broken}, {seconds:.0f} s", flush=True)
            failed = failed or bool(broken)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
