"""The benchmark command: what it reports is measured and adds up."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from click.testing import CliRunner
from odc.geo.geobox import GeoBox
from tiny import tiny_model

from speciesmap.cli import group
from speciesmap.errors import ImageryError
from speciesmap.mapping.benchmark import benchmark
from speciesmap.models import SpeciesModel, save_model
from speciesmap.rasters.geotiff import write_geotiff

FACTORED = {
    "backbone": "test_resnet",
    "factored": {"cell_px": 8, "width": 16, "layers": 1, "heads": 2},
}


@pytest.mark.parametrize("aerial", [{"backbone": "test_resnet"}, FACTORED], ids=["plain", "cells"])
def test_the_numbers_add_up(
    aerial: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = benchmark(
        tiny_model(aerial=aerial), precision="float32", stride_px=8, seconds=0.05, batch_size=8
    )
    assert found["encoder"] == ("factored" if "factored" in aerial else "plain")
    assert found["windows"] > 0
    assert found["ratio"] == pytest.approx(found["windows_per_s"] / found["encoder_windows_per_s"])
    assert found["share_of_product"] == pytest.approx(found["tflops"] / found["product_tflops"])
    assert set(found["seconds"]) == {"read", "copy", "encode", "write", "wait"}
    assert all((value > 0) == (name != "copy") for name, value in found["seconds"].items())
    assert found["seconds"]["encode"] <= found["engine_s"]
    assert found["engine_s"] == pytest.approx(found["windows"] / found["windows_per_s"])
    assert found["peak_memory_mb"] > 100
    assert not list(tmp_path.iterdir()), "the noise and the store are thrown away"


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 90, 90)).astype(np.uint8)
    grid = GeoBox((90, 90), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    scene = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=("red", "green", "blue"))
    model: SpeciesModel = tiny_model(bands=3)
    words = [str(save_model(model, tmp_path / "m", {})), "--imagery", str(scene)]
    words += ["--bands", "red,green,blue", "--seconds", "0.05", "-q"]
    run = CliRunner().invoke(group, ["benchmark", *words, "--json"], catch_exceptions=False)
    found = json.loads(run.stdout)
    assert (found["window_px"], found["stride_px"], found["tiles"]) == (16, 4, 1)
    assert found["precision"] in ("float32", "bfloat16")
    run = CliRunner().invoke(group, ["benchmark", *words], catch_exceptions=False)
    assert run.exit_code == 0
    for heading in ("processor", "encoder alone", "ratio", "achieved", "peak memory"):
        assert heading in run.stdout


def test_imagery_too_small_to_measure_on_is_said_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speciesmap.mapping.benchmark._seconds_each", lambda run, seconds: 1e-3)
    benchmark(tiny_model(), precision="float32", stride_px=16, batch_size=8, seconds=4000)
    assert "too few to tell the engine's speed by; give larger --imagery" in caplog.text


def test_imagery_without_a_valid_window_is_said_so(tmp_path: Path) -> None:
    grid = GeoBox((90, 90), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    pixels = np.zeros((4, 90, 90), np.uint8)
    names = tuple(f"band_{k}" for k in range(4))
    scene = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=names, nodata=0)
    with pytest.raises(ImageryError, match="no window with enough valid pixels"):
        benchmark(tiny_model(), scene, seconds=0.05)
