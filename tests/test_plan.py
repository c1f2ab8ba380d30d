"""A plan is what then happens: the same grid, cells and windows, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from click.testing import CliRunner
from fake_model import FakeModel
from odc.geo.geobox import GeoBox
from tiny import BANDS, tiny_model, tiny_scene

from speciesmap.cli.predict import command
from speciesmap.errors import AreaError
from speciesmap.mapping import plan as planning
from speciesmap.mapping.embed import embed
from speciesmap.models import save_model
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.windows import bounds_in


def test_what_is_planned_is_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MEASURED_S", 0.05)
    path = tiny_scene(tmp_path).imagery
    model = FakeModel(BANDS)
    found = planning.plan(model, path, stride_px=2)
    store = embed(model, path, tmp_path / "a.zarr", stride_px=2)
    assert found.cells == store.geobox.shape
    assert found.windows == store.geobox.shape[0] * store.geobox.shape[1]
    assert found.store_bytes == found.windows * model.dim * 2
    assert found.read_bytes == pytest.approx(path.stat().st_size, rel=0.01)
    assert found.scenes == 1
    assert "EPSG:32610" in found.grid
    west, south, east, north = bounds_in(open_imagery(path).geobox[:40, :40])
    part = planning.plan(model, path, stride_px=2, bbox=(west, south, east, north))
    assert part.cells == (32, 32), "one tile"
    assert part.read_bytes == found.read_bytes, "the scene is one block"
    with pytest.raises(AreaError, match="misses the imagery"):
        planning.plan(model, path, bbox=(0, 0, 1, 1))


def test_a_dry_run_prints_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MEASURED_S", 0.05)
    path = tiny_scene(tmp_path).imagery
    model = save_model(tiny_model(), tmp_path / "model", {})
    before = sorted(tmp_path.rglob("*"))
    words = [str(model), "--imagery", str(path), "--out", str(tmp_path / "maps"), "--dry-run"]
    words += ["--bands", ",".join(BANDS)]
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0
    for word in ("1 scene", "EPSG:32610", "windows", "MB", "windows/s"):
        assert word in result.stdout
    facts = json.loads(CliRunner().invoke(command, [*words, "--json", "-q"]).stdout)
    assert facts["windows"] == facts["cells"][0] * facts["cells"][1]
    assert sorted(tmp_path.rglob("*")) == before
    wrong = CliRunner().invoke(command, [str(model), "--store", "a", "--out", "b", "--dry-run"])
    assert wrong.exit_code == 2


def test_bytes_to_read_are_those_of_whole_blocks(tmp_path: Path) -> None:
    grid = GeoBox((1024, 2048), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    pixels = np.random.default_rng(0).integers(0, 255, (1, *grid.shape)).astype(np.uint8)
    path = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=["pan"])
    imagery, whole = open_imagery(path), path.stat().st_size
    for place, blocks in (
        ((0, 0, 1024, 2048), 8),
        ((0, 0, 512, 512), 1),
        ((500, 500, 20, 20), 4),
        ((-900, 600, 901, 1), 1),
        ((0, 2000, 9, 900), 1),
        ((2000, 0, 5, 5), 0),
    ):
        assert imagery.bytes_in(*place) == pytest.approx(whole * blocks / 8, abs=1)
