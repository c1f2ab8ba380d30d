"""Whatever stops a command, its output is the old one or the new one, whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from interruptions import COMMANDS, Case, cases, stop_at_random
from odc.geo.geobox import GeoBox
from rasterio.transform import from_origin

from speciesmap import cli, outputs
from speciesmap.atlas import predict
from speciesmap.rasters.geotiff import write_geotiff

MOMENTS = 50

REPLACE = """
import sys
from pathlib import Path
from speciesmap.outputs import replacing
version = int(sys.argv[2])
print("ready", flush=True)
while True:
    version += 1
    with replacing(Path(sys.argv[1]), overwrite=True) as folder:
        folder.mkdir()
        for name in range(20):
            (folder / str(name)).write_text(str(version))
"""


def version_of(folder: Path) -> int:
    """The version that all twenty files agree on."""
    found = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(found) == {str(name) for name in range(20)}
    assert len(set(found.values())) == 1, found
    return int(found["0"])


def test_a_killed_process_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    out = tmp_path / "out"
    with outputs.replacing(out) as folder:
        folder.mkdir()
        for name in range(20):
            (folder / str(name)).write_text("0")
    seen = [0]
    for _ in range(MOMENTS):
        words = [sys.executable, "-c", REPLACE, str(out), str(seen[-1])]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        seen.append(version_of(out))
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_without_an_exchange_an_interrupted_rename_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "out"
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "real").rename(out) if kind == "folder" else out.symlink_to(tmp_path / "real")
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part" or ".part" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt), outputs.replacing(out, overwrite=True) as folder:
        folder.mkdir()
    assert (out / "old").exists()
    monkeypatch.undo()
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    with outputs.replacing(out, overwrite=True) as folder:
        folder.mkdir()
        (folder / "new").touch()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@contextmanager
def interrupted_after(calls: int) -> Iterator[list[int]]:
    """Interrupt this thread at some call of a function, as Ctrl-C there would."""
    left = [calls]

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        yield left
    finally:
        sys.setprofile(None)


def test_predict_interrupted_anywhere_leaves_the_old_maps_or_the_new_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 255, (3, 64, 64)).astype(np.uint8)
    grid = GeoBox((64, 64), from_origin(560000, 4150000, 1, 1), "EPSG:32610")
    scene = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=["red", "green", "blue"])
    model: Any = FakeModel()
    out, store = tmp_path / "maps", tmp_path / "store.zarr"

    def run(name: str) -> None:
        predict(model, imagery=scene, store=store, out=out, species=[name], overwrite=True)

    names = ("Quercus agrifolia", "Quercus lobata")
    rest = {"map.html", "run.json", "item.json"}
    whole = [{f"{n.lower().replace(' ', '_')}{s}" for s in (".tif", ".qml")} | rest for n in names]
    run(names[0])
    assert {p.name for p in out.iterdir()} == whole[0]
    with interrupted_after(10**9) as left:
        run(names[1])
        total = 10**9 - left[0]
    assert total > MOMENTS
    outcomes = []
    for k, moment in enumerate(rng.choice(np.arange(1, total + 1), MOMENTS, replace=False)):
        before = {p.name for p in out.iterdir()}
        with interrupted_after(int(moment)):
            try:
                run(names[k % 2])
                outcomes.append("done")
            except (KeyboardInterrupt, RuntimeError) as error:  # of a lock it was to give back
                assert isinstance(error, KeyboardInterrupt) or isinstance(
                    error.__context__, KeyboardInterrupt
                )
                outcomes.append("interrupted")
        after = {p.name for p in out.iterdir()}
        assert after in (before, whole[k % 2])
        assert "</html>" in (out / "map.html").read_text()[-20:]
        left_over = {p.name for p in tmp_path.iterdir()} - {"a.tif", "maps", "store.zarr"}
        assert all(name.startswith(".") for name in left_over)
    assert outcomes.count("interrupted") > MOMENTS / 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return cases(tmp_path_factory.mktemp("inputs"))


QUICK = ("observations", "predict", "map")
"""The others take minutes: `python tests/interruptions.py`."""


@pytest.mark.parametrize("name", QUICK)
def test_a_stopped_command_leaves_the_old_result_or_the_new_one(
    name: str, stopped: dict[str, Case], tmp_path: Path
) -> None:
    outcome, broken = stop_at_random(stopped[name], 3, 0, tmp_path)
    assert not broken
    assert sum(outcome.values()) == 3


def test_every_command_that_writes_is_stopped() -> None:
    writing = {name.split()[0] for name in COMMANDS}
    assert writing == set(cli.COMMANDS) - {"view", "info", "benchmark"}
