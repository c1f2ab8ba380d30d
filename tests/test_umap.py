"""UMAP: like cells have like colours at their own places, photos gather by what they show."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from tiny import BANDS, TAXA, tiny_model, tiny_scene

from speciesmap.cli import main
from speciesmap.datasets.paired import open_paired
from speciesmap.errors import OutputError, QueryError, StoreError
from speciesmap.mapping.umap import (
    fit_umap,
    group_colours,
    photo_points,
    place,
    umap_colours,
    umap_points,
)
from speciesmap.models import save_model
from speciesmap.rasters.store import EmbeddingStore, Identity
from speciesmap.taxa import Taxon

pytest.importorskip("umap", reason="needs umap-learn, pip install 'speciesmap[umap]'")

SIDE = 40


def halves() -> NDArray[np.float16]:
    """West and east look different, each with a little noise; a corner was not encoded."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 0.05, (SIDE, SIDE, 16))
    vectors[:, : SIDE // 2, 0] += 1
    vectors[:, SIDE // 2 :, 1] += 1
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[:5, :5] = np.nan
    return vectors.astype(np.float16)


def make_store(path: Path, vectors: NDArray[np.float16]) -> Path:
    grid = GeoBox(vectors.shape[:2], Affine(10, 0, 550_000, 0, -10, 4_180_000), "EPSG:32610")
    identity = Identity("model", 16, 10, BANDS, "imagery", 0.5)
    store = EmbeddingStore.create(path, identity, grid, vectors.shape[2], source="area")
    with store.writing():
        for tile in store.tiles_in(*(slice(0, side) for side in vectors.shape[:2])):
            rows, cols = store.cells(tile)
            store.write(tile, vectors[rows, cols])
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "area.zarr", halves())


def pixels(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as dataset:
        assert dataset.descriptions == ("red", "green", "blue")
        assert [c.name for c in dataset.colorinterp] == ["red", "green", "blue"]
        assert (dataset.nodata, dataset.crs.to_epsg()) == (0, 32610)
        assert dataset.transform == Affine(10, 0, 550_000, 0, -10, 4_180_000)
        read: NDArray[np.uint8] = dataset.read()
    return read


def test_like_cells_have_like_colours_where_they_are(store: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    colours = pixels(umap_colours(store, tmp_path / "a.tif", sample=300, neighbours=10))
    assert torch.get_num_threads() == threads, "what is computed next is not slowed down"
    assert colours.shape == (3, SIDE, SIDE)
    assert not colours[:, :5, :5].any(), "nothing was encoded there"
    known = np.isfinite(halves()[..., 0])
    assert colours[:, known].min() >= 1
    west = colours[:, :, : SIDE // 2][:, known[:, : SIDE // 2]].T.astype(float)
    east = colours[:, :, SIDE // 2 :].reshape(3, -1).T.astype(float)
    apart = np.linalg.norm(west.mean(0) - east.mean(0))
    assert apart > 2 * max(west.std(0).max(), east.std(0).max())
    again = pixels(umap_colours(store, tmp_path / "b.tif", sample=300, neighbours=10))
    assert np.array_equal(colours, again), "the same seed gives the same colours"
    assert np.percentile(colours[:, known], 99) > 200, "tones reach across the scale"


def test_a_landmark_is_within_half_a_cell(tmp_path: Path) -> None:
    """A disc of other vectors, around a place that is the centre of no cell."""
    rng = np.random.default_rng(0)
    x, y = 550_000 + 10 * 16.3, 4_180_000 - 10 * 21.8
    rows, cols = np.indices((SIDE, SIDE)) + 0.5
    disc = np.hypot(rows - 21.8, cols - 16.3) < 6
    vectors = rng.normal(0, 0.05, (SIDE, SIDE, 8))
    vectors[..., 0] += ~disc
    vectors[..., 1] += disc
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    store = make_store(tmp_path / "area.zarr", vectors.astype(np.float16))
    colours = pixels(umap_colours(store, tmp_path / "a.tif", sample=400, neighbours=10))
    inside, outside = (colours[:, where].mean(axis=1) for where in (disc, ~disc))
    axis = (inside - outside) / np.linalg.norm(inside - outside)
    near = np.tensordot(axis, colours - ((inside + outside) / 2)[:, None, None], 1) > 0
    with rasterio.open(tmp_path / "a.tif") as dataset:
        middle = dataset.transform * (cols[near].mean(), rows[near].mean())
    assert np.abs(np.subtract(middle, (x, y))).max() <= 5


def test_cells_are_placed_where_umap_placed_their_nearest_neighbours() -> None:
    rng = np.random.default_rng(0)
    fitted = F.normalize(torch.from_numpy(rng.normal(size=(200, 8)).astype(np.float32)), dim=1)
    places = torch.from_numpy(rng.normal(size=(200, 3)).astype(np.float32))
    others = F.normalize(fitted[:50] + 0.01, dim=1)
    for count in (5, 1000):
        placed = place(others, fitted, places, count)
        numbers = (others @ fitted.T).argsort(dim=1, descending=True)[:, :count]
        near = places[numbers]
        assert (placed >= near.amin(1) - 1e-5).all() and (placed <= near.amax(1) + 1e-5).all()
    one = place(others, fitted, places, 1)
    np.testing.assert_allclose(one, places[:50], atol=1e-6)
    alike = torch.ones(40, 8) / 8**0.5
    placed = place(alike[:3], alike, places[:40], 40)
    np.testing.assert_allclose(placed, places[:40].mean(0).expand(3, 3), atol=1e-5)


def test_umap_is_told_exact_neighbours_also_of_rounded_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    class Fake:
        def __init__(self, **options: Any) -> None:
            given.update(options)

        def fit_transform(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
            return vectors[:, :2]

    monkeypatch.setattr("umap.UMAP", Fake)
    rng = np.random.default_rng(0)
    vectors = F.normalize(torch.from_numpy(rng.normal(size=(1500, 8))), dim=1).half().float()
    fit_umap(vectors, 2, 5, 0.1, 0)
    numbers, distances = given["precomputed_knn"]
    assert (numbers[:, 0] == np.arange(1500)).all()
    assert (distances[:, 0] == 0).all(), "else umap-learn takes it for the nearest neighbour's"
    exact = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    farthest = 1 - (exact @ exact.T).sort(descending=True).values[:, 4]
    np.testing.assert_allclose(distances[:, 4], farthest, atol=1e-6)


def test_an_area_next_to_empty_is_refused(tmp_path: Path) -> None:
    vectors = np.full((6, 6, 8), np.nan, np.float16)
    vectors[0, :3] = 0.3
    with pytest.raises(StoreError, match="3 encoded cells, too few for UMAP"):
        umap_colours(make_store(tmp_path / "s.zarr", vectors), tmp_path / "a.tif")
    assert not (tmp_path / "a.tif").exists()


def test_the_command_writes_a_picture_and_its_page(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "colours.tif"
    call = ["umap", str(store), "--out", str(out), "--sample", "200", "--json", "-q"]
    with pytest.raises(SystemExit) as end:
        main(call)
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    page = Path(printed["html"]).read_text()
    assert printed["path"] == str(out)
    assert "data:image/webp;base64," in page
    assert "Colours of area.zarr" in page
    assert "https://cdn" not in page
    with pytest.raises(SystemExit) as end:
        main(call)
    assert end.value.code == 1
    assert "exists already" in capsys.readouterr().err


def points(count: int = 60) -> tuple[NDArray[np.float64], list[str], list[str]]:
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 0.05, (count, 8))
    vectors[np.arange(count), np.arange(count) % 3] += 1
    groups = [("Fagaceae", "Pinaceae", "<b>&")[k % 3] for k in range(count)]
    return vectors, groups, [f"{group} {k}" for k, group in enumerate(groups)]


def test_points_gather_by_group_and_tell_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, groups, names = points()
    with caplog.at_level(logging.INFO, logger="speciesmap"):
        page = umap_points(vectors, groups, names, tmp_path / "a.html", title="Photos </script>")
    assert "Fitting UMAP to 60 vectors" in caplog.text
    text = page.read_text()
    assert "<b>&" not in text
    assert text.count("</script>") == 2
    start = text.index('id="facts">') + len('id="facts">')
    facts: Any = json.loads(text[start : text.index("</script>", start)])
    assert facts["title"] == "Photos </script>"
    assert {point[3] for point in facts["points"]} == set(names)
    places = np.array([point[:2] for point in facts["points"]])
    assert places.min() >= 0
    assert places.max() <= 1000
    centres = np.array([places[k::3].mean(0) for k in range(3)])
    for k in range(3):
        distance = np.linalg.norm(places[k::3][:, None] - centres, axis=2)
        assert (distance.argmin(1) == k).all()
    colours = group_colours(groups)
    assert [point[2] for point in facts["points"]] == [colours[group] for group in groups]
    picture = umap_points(vectors, groups, names, tmp_path / "a.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_largest_groups_have_colours_and_others_are_grey() -> None:
    groups = [f"g{k:02}" for k in range(20) for _ in range(k + 1)]
    colours = group_colours(groups)
    assert list(colours) == [f"g{k:02}" for k in range(19, 7, -1)]
    assert len(set(colours.values())) == 12


def test_points_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    vectors, groups, names = points()
    with pytest.raises(QueryError, match=r"neither \.html nor \.png"):
        umap_points(vectors, groups, names, tmp_path / "a.pdf")
    with pytest.raises(QueryError, match="got 4 points"):
        umap_points(vectors[:4], groups[:4], names[:4], tmp_path / "a.png")
    with pytest.raises(QueryError, match="59 names"):
        umap_points(vectors, groups, names[:-1], tmp_path / "a.png")
    (tmp_path / "a.png").touch()
    with pytest.raises(OutputError, match="exists already"):
        umap_points(vectors, groups, names, tmp_path / "a.png")


def test_photos_of_a_data_set_are_drawn_by_family(tmp_path: Path) -> None:
    scene = tiny_scene(tmp_path)
    vectors, groups, names = photo_points(tiny_model(), open_paired(scene.chips), rank=-2)
    assert vectors.shape == (36, 16)
    assert set(groups) == {"Fagaceae", "Pinaceae"}
    assert dict(zip(names, groups, strict=True))["Pinus sabiniana"] == "Pinaceae"
    dataset = open_paired(scene.chips)
    ragged = replace(dataset, taxa=(*TAXA[:2], Taxon("Pinus sabiniana", ("Plantae",))))
    assert set(photo_points(tiny_model(), ragged, rank=1)[1]) == {"Fagaceae", "Pinus"}
    nameless = replace(dataset, taxa=[Taxon(taxon.name) for taxon in TAXA])
    assert set(photo_points(tiny_model(), nameless, rank=-2)[1]) == {"Quercus", "Pinus"}
    for rank in (-4, 3, 9):
        wanted = rf"--rank {rank} is beyond .* 3 names, as Plantae/Fagaceae/Quercus; give -3 to 2"
        with pytest.raises(QueryError, match=wanted):
            photo_points(tiny_model(), dataset, rank=rank)
        with pytest.raises(QueryError, match="of no names; leave --rank out"):
            photo_points(tiny_model(), nameless, rank=rank)
    model = save_model(tiny_model(), tmp_path / "model", {})
    call = ["umap", str(scene.chips), "--photos", str(model), "--out", str(tmp_path / "p.html")]
    with pytest.raises(SystemExit) as end:
        main([*call, "-q"])
    assert end.value.code == 0
    assert "Quercus lobata" in (tmp_path / "p.html").read_text()
