"""A simulated scene is made of ordinary files, keeps its promises, and hides what it should."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from rasterio.warp import transform
from scipy import ndimage
from scipy.stats import spearmanr

from speciesmap.cli.simulate import command
from speciesmap.errors import ConfigError, OutputError
from speciesmap.simulate import Scene, simulate
from speciesmap.simulate.landscape import make_landscape, render_aerial
from speciesmap.simulate.species import Streams, VirtualSpecies, make_species, observe

SIZE_PX = 512


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return simulate(tmp_path_factory.mktemp("simulate") / "scene", size_px=SIZE_PX, seed=3)


@pytest.fixture(scope="module")
def world() -> tuple[NDArray[np.float32], list[VirtualSpecies]]:
    """Latent fields and 24 species, without a raster."""
    streams = Streams(5)
    landscape = make_landscape(streams("landscape", 0), 1024)
    return landscape.fields, make_species(streams, landscape, 24)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def truth_at(path: Path, lon: pd.Series, lat: pd.Series) -> NDArray[np.float64]:
    with rasterio.open(path) as source:
        x, y = transform("EPSG:4326", source.crs, list(lon), list(lat))
        return np.array([v[0] for v in source.sample(zip(x, y, strict=True))], np.float64)


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    one = hashes(simulate(tmp_path / "a", size_px=256, species=3, seed=11).path)
    two = hashes(simulate(tmp_path / "b", size_px=256, species=3, seed=11).path)
    other = hashes(simulate(tmp_path / "c", size_px=256, species=3, seed=12).path)
    assert one == two
    assert one["aerial.tif"] != other["aerial.tif"]
    assert one["observations.csv"] != other["observations.csv"]


def test_more_species_leave_landscape_and_earlier_species_alone(tmp_path: Path) -> None:
    few = simulate(tmp_path / "few", size_px=256, species=3, seed=1)
    many = simulate(tmp_path / "many", size_px=256, species=6, seed=1)
    assert few.aerial.read_bytes() == many.aerial.read_bytes()
    for name, path in few.truth.items():
        assert path.read_bytes() == many.truth[name].read_bytes()
    rows = pd.read_csv(many.observations)
    rows = rows[rows.scientific_name.isin([t.name for t in few.taxa])].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, pd.read_csv(few.observations))


def test_rasters_say_what_and_where_they_are(scene: Scene) -> None:
    with rasterio.open(scene.aerial) as aerial:
        assert aerial.crs.to_epsg() == 32610
        assert aerial.descriptions == ("red", "green", "blue", "nir")
        assert aerial.dtypes == ("uint8",) * 4
        assert aerial.shape == (SIZE_PX, SIZE_PX)
        assert aerial.res == pytest.approx((0.6, 0.6))
        bounds = aerial.bounds
        pixels = aerial.read()
    assert (pixels == 255).mean() < 0.02
    assert pixels.std(axis=(1, 2)).min() > 10
    assert set(scene.truth) == {taxon.name for taxon in scene.taxa}
    for path in scene.truth.values():
        with rasterio.open(path) as truth:
            assert truth.crs.to_epsg() == 32610
            assert truth.bounds == pytest.approx(bounds)
            assert truth.descriptions == ("probability",)
            assert truth.dtypes == ("float32",)
            probability = truth.read(1)
        assert probability.min() >= 0
        assert probability.max() <= 1
        assert 0.1 <= probability.mean() <= 0.35


def test_observations_lie_in_the_raster_and_follow_the_truth(scene: Scene) -> None:
    rows = pd.read_csv(scene.observations)
    assert set(rows.scientific_name) == {taxon.name for taxon in scene.taxa}
    assert set(rows.quality_grade) == {"research"}
    assert rows.id.is_unique
    assert rows.uuid.is_unique
    assert rows.positional_accuracy.between(3, 10).all()
    assert pd.to_datetime(rows.observed_on).between("2016-01-01", "2024-12-31").all()
    with rasterio.open(scene.aerial) as aerial:
        x, y = transform("EPSG:4326", aerial.crs, list(rows.longitude), list(rows.latitude))
        left, bottom, right, top = aerial.bounds
    assert min(x) > left
    assert max(x) < right
    assert min(y) > bottom
    assert max(y) < top
    for taxon in scene.taxa[:-1]:
        own = rows[rows.scientific_name == taxon.name]
        seen = truth_at(scene.truth[taxon.name], own.longitude, own.latitude).mean()
        with rasterio.open(scene.truth[taxon.name]) as truth:
            assert seen > truth.read(1).mean() + 0.05


def test_lineage_columns_agree_with_the_taxa(scene: Scene) -> None:
    rows = pd.read_csv(scene.observations)
    for taxon in scene.taxa:
        own = rows[rows.scientific_name == taxon.name].iloc[0]
        columns = ["taxon_kingdom_name", "taxon_family_name", "taxon_genus_name"]
        assert tuple(own[columns]) == taxon.lineage
        assert own.taxon_species_name == taxon.name


def test_reported_places_err_as_the_uncertainty_says() -> None:
    streams = Streams(2)
    landscape = make_landscape(streams("landscape", 0), 2048)
    species = make_species(streams, landscape, 3)[0]
    seen = observe(streams("observations", 0), species, landscape)
    error = np.hypot(seen.reported_x_m - seen.x_m, seen.reported_y_m - seen.y_m)
    assert 290 <= len(error) <= 360
    assert 0.90 < np.mean(error <= seen.uncertainty_m) < 0.99
    assert error.max() > 3


def test_every_observation_has_its_own_readable_photo(scene: Scene) -> None:
    names = pd.read_csv(scene.observations).image_url
    assert names.is_unique
    assert {path.name for path in scene.photos.iterdir()} == set(names)
    for name in names[::7]:
        with Image.open(scene.photos / name) as photo:
            assert photo.format == "JPEG"
            assert photo.mode == "RGB"
            assert min(photo.size) >= 96
            assert np.asarray(photo).std() > 8


def test_photos_of_congeners_look_more_alike_than_those_of_strangers(scene: Scene) -> None:
    rows = pd.read_csv(scene.observations)

    def mean_photo(name: str) -> NDArray[np.float64]:
        files = rows.image_url[rows.scientific_name == name]
        photos = [np.asarray(Image.open(scene.photos / f), float) for f in files]
        return np.mean(photos, axis=0)[48:]  # the lower half, where the leaf is

    first, second, *_, stranger = (mean_photo(taxon.name) for taxon in scene.taxa[:6])
    assert np.abs(first - second).mean() < np.abs(first - stranger).mean()


def test_sites_are_bernoulli_draws_from_the_truth(scene: Scene) -> None:
    sites = pd.read_csv(scene.sites)
    assert list(sites.columns) == ["lon", "lat", "taxon", "present"]
    assert set(sites.taxon) == {taxon.name for taxon in scene.taxa}
    assert set(sites.present) == {0, 1}
    assert sites.groupby("taxon").size().nunique() == 1
    for name, own in sites.groupby("taxon"):
        truth = truth_at(scene.truth[str(name)], own.lon, own.lat)
        spread = np.sqrt(np.sum(truth * (1 - truth)))
        assert abs(own.present.sum() - truth.sum()) < 4 * spread
        high = truth > np.median(truth)
        assert own.present[high].mean() > own.present[~high].mean()


def test_congeners_live_alike_and_the_control_like_nothing(
    world: tuple[NDArray[np.float32], list[VirtualSpecies]],
) -> None:
    fields, species = world
    *niche, control = species
    maps = np.stack([one.probability.ravel() for one in niche])
    rho = spearmanr(maps, axis=1).statistic
    genus = np.array([one.genus for one in niche])
    alike = genus[:, None] == genus
    np.fill_diagonal(rho, np.nan)
    assert np.nanmin(rho[alike]) > 0.75
    assert np.nanmean(rho[~alike]) < 0.4
    hidden = control.probability.ravel()
    assert control.optimum is None
    for field in (*fields, *(one.probability for one in niche)):
        assert abs(spearmanr(hidden, field.ravel()).statistic) < 0.1
    # Half a window (19 m) away, nothing is left of what the control follows.
    shift = 4
    near, far = control.probability[:, :-shift].ravel(), control.probability[:, shift:].ravel()
    assert abs(np.corrcoef(near, far)[0, 1]) < 0.15


def test_latent_fields_are_standard_normal_and_hardly_correlated(
    world: tuple[NDArray[np.float32], list[VirtualSpecies]],
) -> None:
    flat = world[0].reshape(4, -1)
    assert np.abs(flat.mean(axis=1)).max() < 0.01
    assert np.abs(flat.std(axis=1) - 1).max() < 0.01
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.2


def test_structure_shows_the_habitat_whatever_the_exposure() -> None:
    """What is dark against its own surroundings, which no gain changes, tells the canopy."""
    streams = Streams(0)
    landscape = make_landscape(streams("landscape", 0), SIZE_PX)
    red = render_aerial(streams("aerial", 0), landscape)[0].astype(float)
    half = red.reshape(SIZE_PX // 2, 2, SIZE_PX // 2, 2).mean((1, 3))
    dark = half < 0.7 * ndimage.percentile_filter(half, 80, 15)
    blocks = SIZE_PX // 64
    share = dark.reshape(blocks, 32, blocks, 32).mean((1, 3)).ravel()
    canopy = landscape.fields[2].reshape(blocks, 8, blocks, 8).mean((1, 3)).ravel()
    assert spearmanr(share, canopy).statistic > 0.55


def test_description_names_seed_control_and_files(scene: Scene) -> None:
    facts = json.loads(scene.description.read_text())
    assert facts["seed"] == 3
    assert facts["control"] == scene.control == scene.taxa[-1].name
    assert [taxon["name"] for taxon in facts["taxa"]] == [taxon.name for taxon in scene.taxa]
    assert facts["taxa"][-1]["niche"] is None
    assert all((scene.path / facts["files"][key]).exists() for key in ("aerial", "photos", "sites"))
    genera = [taxon.genus for taxon in scene.taxa]
    assert sum(genera.count(genus) == 2 for genus in set(genera)) >= 3
    assert genera.count(scene.taxa[-1].genus) == 1


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"species": 2}, "species is 2"),
        ({"species": 25}, "species is 25"),
        ({"size_px": 64}, "size_px is 64"),
        ({"size_px": 1001}, "size_px is 1001"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, numbers: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(tmp_path / "scene", **numbers)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_existing_scene_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "scene"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        simulate(out, size_px=256, species=3)
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]
    assert (out / "mine.txt").read_text() == "precious"
    simulate(out, size_px=256, species=3, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert (out / "aerial.tif").exists()


def test_the_command_prints_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "scene"
    result = CliRunner().invoke(
        command, ["--out", str(out), "--size-px", "256", "--species", "3", "--seed", "2", "-q"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert (out / "scene.json").exists()
