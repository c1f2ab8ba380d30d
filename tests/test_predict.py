"""From a model and imagery to a folder of maps: every way of asking, every bad input."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from affine import Affine
from fake_model import BlobModel, FakeModel
from forks import ended, start
from odc.geo.geobox import GeoBox
from PIL import Image
from rio_cogeo.cogeo import cog_validate
from tiny import TAXA, tiny_model

from speciesmap import atlas, cli
from speciesmap.errors import ConfigError, QueryError, StoreError
from speciesmap.mapping.embed import embed
from speciesmap.mapping.predict import write_maps
from speciesmap.mapping.query import (
    Query,
    make_queries,
    photo_query,
    score,
    taxon_query,
    text_query,
    without_calibration,
)
from speciesmap.models import Architecture, SpeciesModel, load_model, save_model
from speciesmap.models.crisp import START_LOG_SCALE
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import open_imagery
from speciesmap.rasters.store import open_store
from speciesmap.rasters.windows import bounds_in
from speciesmap.taxa import Taxon, every_name

ORIGIN = Affine(1, 0, 550_000, 0, -1, 4_180_000)
BANDS = ("red", "green", "blue")
BBOX = (-122.4319, 37.7645, -122.4312, 37.7655)


def scene(path: Path, shape: tuple[int, int] = (200, 260), bands: int = 3) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (bands, *shape)).astype(np.uint8)
    names = (*BANDS, "nir")[:bands]
    return write_geotiff(path, pixels, GeoBox(shape, ORIGIN, "EPSG:32610"), bands=names)


def photo(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, tiny model with all three towers and two taxa."""
    torch.manual_seed(0)
    model = SpeciesModel(
        Architecture(
            dim=16,
            bands=BANDS,
            window_px=32,
            resolution_m=1.0,
            mean=(128.0,) * 3,
            std=(64.0,) * 3,
            aerial={"backbone": "test_resnet"},
            ground={"backbone": "test_resnet", "image_px": 32},
            text={"width": 32, "layers": 1, "heads": 2},
        ),
        [Taxon("Quercus agrifolia", ("Fagaceae", "Quercus")), Taxon("Quercus lobata")],
        references=32,
    )
    model.reference.copy_(F.normalize(torch.randn(32, 16), dim=1))
    return save_model(model, tmp_path_factory.mktemp("model") / "run", {"training": {"seed": 7}})


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process."""

    def run(*words: object) -> SimpleNamespace:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=stop.value.code or 0, out=out, err=err)

    return run


# ---- asking


def test_a_taxon_is_asked_by_its_learned_embedding() -> None:
    model = FakeModel()
    query = taxon_query(model, "quercus LOBATA")
    assert (query.label, query.kind, query.quantity) == ("Quercus lobata", "taxon", "probability")
    assert (query.vector == model.head.vectors[1].numpy()).all()
    assert (query.gain, query.offset) == (4.0, -1.0)
    assert taxon_query(model, "Quercus agrifolia").quantity == "suitability"
    with pytest.raises(QueryError, match=r"'Quercus lobatta'; did you mean 'Quercus lobata'"):
        taxon_query(model, "Quercus lobatta")


def test_by_default_every_taxon_is_asked_for() -> None:
    model = FakeModel()
    assert [q.label for q in make_queries(model)] == [taxon.name for taxon in model.taxa]
    model.taxa = ()
    with pytest.raises(QueryError, match=r"knows no taxa.*answers no query yet: fine-tune it"):
        make_queries(model)
    with pytest.raises(QueryError, match="so it cannot map 'Quercus lobata'; it answers no"):
        taxon_query(model, "Quercus lobata")
    model.text = object()  # type: ignore[assignment]
    with pytest.raises(QueryError, match=r"knows no taxa.*; ask with --text, or fine-tune it"):
        make_queries(model)


def test_photos_ask_together_by_their_mean_direction(tmp_path: Path) -> None:
    model = FakeModel()
    directions = F.normalize(torch.randn(2, 8, generator=torch.manual_seed(3)), dim=1)
    model.ground = object()  # type: ignore[assignment]
    model.encode_ground = lambda images: directions[: len(images)]  # type: ignore[attr-defined]
    files = [photo(tmp_path / f"{n}.jpg", n) for n in range(2)]
    query = photo_query(model, files)
    expected = F.normalize(directions.sum(dim=0), dim=0).numpy()
    assert np.allclose(query.vector, expected, atol=1e-6)
    assert np.linalg.norm(query.vector) == pytest.approx(1, abs=1e-6)
    assert query.label == "0 and 1 more"
    assert query.stem == "photo_0_and_1_more"


def test_a_folder_asks_as_its_photos_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    files = [photo(tmp_path / "oaks" / f"{n}.{s}", n) for n, s in enumerate(("JPG", "png", "jpg"))]
    for name in ("licence.txt", "._0.jpg"):
        (tmp_path / "oaks" / name).write_text("CC0")
    (tmp_path / "oaks" / "more.jpg").mkdir()
    query = photo_query(model, [tmp_path / "oaks"])
    assert (query.label, query.stem) == ("oaks", "photo_oaks")
    monkeypatch.chdir(tmp_path / "oaks")
    assert photo_query(model, ["."]).label == "oaks"
    np.testing.assert_allclose(query.vector, photo_query(model, files).vector, atol=1e-6)
    other = photo(tmp_path / "other.jpg", 7)
    both = photo_query(model, [tmp_path / "oaks", other])
    assert both.label == "oaks and 1 more"
    monkeypatch.setattr("speciesmap.mapping.query.OPENED", 2)
    in_parts = photo_query(model, [*files, other]).vector
    np.testing.assert_allclose(both.vector, in_parts, atol=1e-6)


def test_what_is_no_photo_in_a_folder_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = tiny_model(), tmp_path / "oaks"
    files = [photo(folder / "a.jpg", 1), photo(folder / "scan.tif", 2)]
    expected = photo_query(model, files)
    scene(folder / "map.tif")  # pixels of several bands, one after the other
    grid = GeoBox((8, 8), ORIGIN, "EPSG:32610")
    write_geotiff(folder / "dem.tif", np.ones((1, 8, 8), np.uint8), grid, bands=["height"])
    with caplog.at_level("WARNING", "speciesmap"):
        query = photo_query(model, [folder])
    (told,) = (message for message in caplog.messages if "cannot be read" in message)
    assert "dem.tif cannot be read (" in told
    assert told.endswith(", nor can 1 more; going on with the other 2 photos")
    assert query.photos == tuple(files)
    np.testing.assert_allclose(query.vector, expected.vector, atol=1e-6)
    with pytest.raises(QueryError, match=r"dem\.tif cannot be read \(it is a map, .* no photo\)"):
        photo_query(model, [folder, folder / "dem.tif"])
    for file in files:
        file.unlink()
    with pytest.raises(QueryError, match=r"dem\.tif cannot be read .*, nor can any other; give"):
        photo_query(model, [folder])


def test_an_untrained_query_is_scaled_by_the_training_landscape(tmp_path: Path) -> None:
    model = FakeModel(dim=64)
    model.reference = F.normalize(
        torch.randn(4000, 64, generator=torch.manual_seed(2)) + 0.3, dim=1
    )
    direction = F.normalize(torch.randn(1, 64, generator=torch.manual_seed(3)) + 0.2, dim=1)
    model.text = object()  # type: ignore[assignment]
    model.encode_text = lambda prompts: direction  # type: ignore[attr-defined]
    query = text_query(model, "Fagaceae  Quercus")
    assert (query.label, query.quantity) == ("Fagaceae Quercus", "suitability")
    values = score(model.reference.numpy(), [query])[0]
    cosines = (model.reference @ direction[0]).numpy()
    share_less = np.argsort(np.argsort(cosines)) / len(cosines)
    assert np.abs(values - share_less).max() < 0.05


def test_a_model_without_the_tower_says_so(tmp_path: Path) -> None:
    model = FakeModel()
    known = re.escape("ask with --species (Quercus agrifolia, ...)")
    with pytest.raises(QueryError, match=rf"no ground tower.*--photo .*a\.jpg; {known}, or use"):
        photo_query(model, [photo(tmp_path / "a.jpg")])
    with pytest.raises(QueryError, match=rf"no text tower.*--text 'oak'; {known}, or use"):
        text_query(model, "oak")
    model.ground = object()  # type: ignore[assignment]
    with pytest.raises(QueryError, match=rf"--text 'oak'; {known} or --photo, or use"):
        text_query(model, "oak")
    model.taxa, model.joined = (), False
    with pytest.raises(QueryError, match="--text 'oak'; it answers no query yet: use"):
        text_query(model, "oak")


def test_a_map_of_photos_that_no_training_joined_to_windows_is_said_to_say_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    with caplog.at_level(logging.WARNING, logger="speciesmap"):
        query = photo_query(model, [photo(tmp_path / "a.jpg")])
        assert "so its map says nothing" in query.caution
        assert f"a: {query.caution}" in caplog.messages
        caplog.clear()
        torch.nn.init.ones_(model.log_scale)
        photo_query(model, [photo(tmp_path / "a.jpg")])
    assert "says nothing" not in caplog.text


def test_words_that_training_never_saw_are_said_to_mean_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.reference = F.normalize(torch.randn(8, 16, generator=torch.manual_seed(0)), dim=1)
    torch.nn.init.ones_(model.log_scale)
    assert text_query(model, "xyzzy").caution == "", "an old checkpoint does not know"
    model.names = every_name(TAXA)
    read = load_model(save_model(model, tmp_path / "model", {}))
    for known in ("Quercus kelloggii", "QUERCUS_sp", "oaks (Fagaceae)", "sabiniana"):
        assert text_query(read, known).caution == "", known
    assert not caplog.text
    near = text_query(read, "Qurcus agrifola")
    assert "saw no word of this name in training, so its map says nothing" in near.caution
    assert "; did you mean 'Quercus agrifolia'" in near.caution
    assert caplog.messages == [f"Qurcus agrifola: {near.caution}"]
    assert without_calibration(near).caution == near.caution
    far = text_query(read, "12")
    assert "; it knows Quercus agrifolia, Plantae, Fagaceae" in far.caution
    read.log_scale.data.fill_(START_LOG_SCALE)
    assert "no contrastive loss" in text_query(read, "xyzzy").caution


def test_scores_are_logistic_in_the_cosine_and_nodata_stays() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 7, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[2, 3] = np.nan
    queries = [
        Query(str(n), "text", vectors[0, n], gain=3.0 + n, offset=n - 1.0, quantity="suitability")
        for n in range(3)
    ]
    values = score(vectors.astype(np.float16), queries)
    assert values.shape == (3, 5, 7)
    for query, made in zip(queries, values, strict=True):
        expected = 1 / (1 + np.exp(-(query.gain * vectors @ query.vector + query.offset)))
        np.testing.assert_allclose(made, expected, atol=5e-3)
    assert np.isnan(values[:, 2, 3]).all()
    assert np.isfinite(values).sum() == 3 * 34


# ---- maps


def test_a_query_scores_the_same_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    places = F.normalize(torch.from_numpy(rng.normal(size=(32, 32, 128))), dim=2).half().numpy()
    directions = rng.normal(size=(37, 128)).astype(np.float32)
    queries = [
        Query(f"q{k}", "text", v, 3.0, 0.1 * k, "suitability") for k, v in enumerate(directions)
    ]
    together = score(places, queries)
    for query, values in zip(queries, together, strict=True):
        np.testing.assert_array_equal(score(places, [query])[0], values)


def test_the_maps_maximum_lies_on_a_planted_object(tmp_path: Path) -> None:
    pixels = np.full((3, 200, 260), 90, np.uint8)
    pixels[:, 120:124, 60:64] = 255
    grid = GeoBox((200, 260), ORIGIN, "EPSG:32610")
    path = write_geotiff(tmp_path / "a.tif", pixels, grid, bands=BANDS)
    made = atlas.predict(
        BlobModel(window_px=32), imagery=path, species=["Quercus agrifolia"], out=tmp_path / "maps"
    )
    with rasterio.open(made.maps[0].path) as raster:
        values = raster.read(1)
        x, y = raster.xy(*np.unravel_index(np.nanargmax(values), values.shape))
    assert abs(x - 550_062) <= 4  # half a stride
    assert abs(y - (4_180_000 - 122)) <= 4


def test_the_map_of_an_area_equals_the_crop_of_the_whole_map(tmp_path: Path) -> None:
    model, path = FakeModel(), scene(tmp_path / "a.tif", (300, 400))
    whole = atlas.predict(model, imagery=path, out=tmp_path / "whole").to_xarray()
    part = atlas.predict(model, imagery=path, bbox=BBOX, out=tmp_path / "part").to_xarray()
    assert 5 < part.sizes["y"] < whole.sizes["y"] / 2
    assert 5 < part.sizes["x"] < whole.sizes["x"] / 2
    crop = whole.sel(x=part.x, y=part.y)  # exact coordinates: the same cells
    for name in part.data_vars:
        assert crop[name].values.tobytes() == part[name].values.tobytes()
    left, bottom, right, top = bounds_in(open_imagery(tmp_path / "part/quercus_lobata.tif").geobox)
    cell = 4 / 88_000
    assert np.allclose([left, bottom, right, top], BBOX, atol=1.5 * cell)


def test_maps_are_cogs_that_say_what_they_are(tmp_path: Path) -> None:
    made = atlas.predict(FakeModel(), imagery=scene(tmp_path / "a.tif"), out=tmp_path / "maps")
    assert [m.path.name for m in made.maps] == [
        "quercus_agrifolia.tif",
        "quercus_lobata.tif",
        "ariolimax_dolichophallus.tif",
    ]
    for m in made.maps:
        valid, errors, warnings = cog_validate(m.path, strict=True)
        assert valid, (errors, warnings)
        with rasterio.open(m.path) as raster:
            values = raster.read(1)
            assert raster.dtypes == ("float32",)
            assert np.isnan(raster.nodata)
            assert np.nanmin(values) >= 0
            assert np.nanmax(values) <= 1
            assert raster.descriptions == (m.query.quantity,)
            tags = raster.tags()
            assert (tags["TAXON"], tags["QUERY"]) == (m.query.label, "taxon")
            assert tags["MODEL"] == "fake"
        assert m.path.with_suffix(".qml").is_file()
    names = {p.name for p in made.path.iterdir()}
    assert names == {
        *(f"{m.path.stem}{suffix}" for m in made.maps for suffix in (".tif", ".qml")),
        "map.html",
        "run.json",
        "item.json",
    }
    record = json.loads(made.run.read_text())
    for name, entry in record["maps"].items():
        assert entry["sha256"] == hashlib.sha256((made.path / name).read_bytes()).hexdigest()
    assert record["imagery"]["fingerprint"] == open_imagery(tmp_path / "a.tif").fingerprint
    assert record["model"]["fingerprint"] == "fake"
    assert set(record["seconds"]) == {"encode", "score", "present"}
    assert json.loads(made.item.read_text())["id"] == "maps"
    opened = made.to_xarray()
    assert opened.rio.crs.to_epsg() == 32610
    assert opened["quercus_lobata"].attrs["long_name"] == "Quercus lobata"


def test_asking_the_same_store_again_encodes_nothing(tmp_path: Path) -> None:
    model, path = FakeModel(), scene(tmp_path / "a.tif")
    first = atlas.predict(model, imagery=path, out=tmp_path / "maps")
    encoded = model.encoded
    assert encoded > 0
    again = atlas.predict(model, imagery=path, out=tmp_path / "maps", overwrite=True)
    third = atlas.predict(model, store=first.store, out=tmp_path / "more")
    assert model.encoded == encoded
    for a, b, c in zip(first.maps, again.maps, third.maps, strict=True):
        assert b.path.read_bytes() == c.path.read_bytes()
        assert a.query.label == b.query.label


def test_a_retrained_model_replaces_its_own_store_only_when_told(tmp_path: Path) -> None:
    path = scene(tmp_path / "a.tif")
    atlas.predict(FakeModel(), imagery=path, out=tmp_path / "maps")
    other = FakeModel(fingerprint="other")
    named = embed(FakeModel(), path, tmp_path / "named.zarr")
    with pytest.raises(StoreError, match="model fake, not other"):
        atlas.predict(other, imagery=path, store=named, out=tmp_path / "maps", overwrite=True)
    with pytest.raises(StoreError, match="with model fake, not other"):
        atlas.predict(other, store=named, out=tmp_path / "more")
    made = atlas.predict(other, imagery=path, out=tmp_path / "maps", overwrite=True)
    assert open_store(made.store).identity.model == "other"
    assert open_store(named.path).identity.model == "fake"


def test_a_store_of_an_area_maps_that_area_and_says_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = FakeModel(), scene(tmp_path / "a.tif")
    left, bottom, right, top = bounds_in(open_imagery(path).geobox)
    north = (left, 37.7650, right, top)
    store = embed(model, path, tmp_path / "s.zarr", bbox=north)
    done = store.done()
    assert done is not None
    made = write_maps(store, make_queries(model), tmp_path)
    with rasterio.open(made[0].path) as raster:
        assert raster.shape == (done[0].stop - done[0].start, done[1].stop - done[1].start)
        assert np.isfinite(raster.read(1)[2:, 2:-2]).all()  # its corners look half outside
    (tmp_path / "all").mkdir()
    with caplog.at_level(logging.WARNING, logger="speciesmap"):
        made = write_maps(store, make_queries(model), tmp_path / "all", bbox=(-123, 37, -122, 38))
    assert "tiles of the area are not in" in caplog.text
    with rasterio.open(made[0].path) as raster:
        values = raster.read(1)
    assert np.isfinite(values[done][2:, 2:-2]).all()
    assert np.isnan(values[done[0].stop :]).all()
    south = (left, bottom, right, bottom + 0.0003)
    with pytest.raises(StoreError, match="holds nothing yet of the area"):
        write_maps(store, make_queries(model), tmp_path, bbox=south)


def test_an_area_without_a_valid_window_is_said_to_be_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = FakeModel(window_px=64), scene(tmp_path / "small.tif", shape=(20, 20))
    store = embed(model, path, tmp_path / "s.zarr", stride_px=8)
    write_maps(store, make_queries(model), tmp_path)
    assert "the maps are empty: no window of the area has 50% of valid pixels" in caplog.text
    caplog.clear()
    store = embed(model, path, tmp_path / "less.zarr", stride_px=8, min_valid=0.01)
    (tmp_path / "less").mkdir()
    write_maps(store, make_queries(model), tmp_path / "less")
    assert "empty" not in caplog.text


def test_an_area_that_the_imagery_covers_in_part_is_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = FakeModel(window_px=8), scene(tmp_path / "small.tif", shape=(20, 20))
    west, south, east, north = bounds_in(open_imagery(path).geobox)
    embed(model, path, tmp_path / "s.zarr", bbox=(west, south, east, north))
    assert "covers" not in caplog.text
    whole = (west, south - 3 * (north - south), east, north)
    embed(model, path, tmp_path / "t.zarr", bbox=whole)
    assert "small.tif covers 25% of --bbox" in caplog.text


def test_files_of_equal_names_do_not_overwrite_each_other(tmp_path: Path) -> None:
    store = embed(FakeModel(), scene(tmp_path / "a.tif"), tmp_path / "s.zarr")
    vector = np.eye(8, dtype=np.float32)[0]
    queries = [Query(name, "taxon", vector, 1, 0, "suitability") for name in ("A b", "A-b", "a b")]
    maps = write_maps(store, queries, tmp_path)
    assert [m.path.name for m in maps] == ["a_b.tif", "a_b_2.tif", "a_b_3.tif"]


def test_maps_are_the_same_bytes_however_many_threads_there_are(tmp_path: Path) -> None:
    store = embed(FakeModel(), scene(tmp_path / "a.tif"), tmp_path / "s.zarr", stride_px=2)
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    queries = [Query(f"a {k}", "taxon", v, 3, 0, "suitability") for k, v in enumerate(vectors)]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            (folder := tmp_path / str(count)).mkdir()
            found.append([m.path.read_bytes() for m in write_maps(store, queries, folder)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_more_maps_than_files_may_be_open_are_written_in_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speciesmap.mapping import predict as module

    store = embed(FakeModel(), scene(tmp_path / "a.tif"), tmp_path / "s.zarr")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = write_maps(store, make_queries(FakeModel()), tmp_path / "one")
    monkeypatch.setattr(module, "MOST_OPEN_MAPS", 2)
    two = write_maps(store, make_queries(FakeModel()), tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        with rasterio.open(a.path) as first, rasterio.open(b.path) as second:
            assert first.tags() == second.tags()
            np.testing.assert_allclose(first.read(), second.read(), atol=1e-6)


def test_a_query_of_another_model_is_refused(tmp_path: Path) -> None:
    store = embed(FakeModel(), scene(tmp_path / "a.tif"), tmp_path / "s.zarr")
    query = Query("x", "text", np.ones(5, np.float32), 1, 0, "suitability")
    with pytest.raises(QueryError, match="'x' has 5 dimensions"):
        write_maps(store, [query], tmp_path)


def test_a_failure_while_presenting_leaves_no_folder_and_keeps_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("page")

    monkeypatch.setattr(atlas, "make_map", fail)
    with pytest.raises(RuntimeError, match="page"):
        atlas.predict(FakeModel(), imagery=scene(tmp_path / "a.tif"), out=tmp_path / "maps")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "maps.store.zarr"]


def picture_of(page: Path) -> Image.Image | None:
    found = re.search(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page.read_text())
    return Image.open(io.BytesIO(base64.b64decode(found[1]))) if found else None


def test_the_page_shows_the_imagery_that_was_mapped_not_all_that_its_folder_holds(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "scenes"
    for zone in (10, 14):
        pixels = np.random.default_rng(zone).integers(1, 255, (3, 200, 260)).astype(np.uint8)
        grid = GeoBox((200, 260), ORIGIN, f"EPSG:326{zone}")
        write_geotiff(folder / f"{zone}.tif", pixels, grid, bands=BANDS)
    made = atlas.predict(
        FakeModel(), imagery=folder, out=tmp_path / "maps", bbox=BBOX, stride_px=16
    )
    picture = picture_of(made.html)
    assert picture is not None and min(picture.size) > 50


def test_maps_are_kept_where_no_picture_of_the_imagery_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = scene(tmp_path / "a.tif")
    monkeypatch.setattr(atlas, "write_maps", gone(source, atlas.write_maps))
    with caplog.at_level("WARNING", logger="speciesmap"):
        made = atlas.predict(FakeModel(), imagery=source, out=tmp_path / "maps", stride_px=16)
    assert not source.exists() and all(m.path.exists() for m in made.maps)
    assert picture_of(made.html) is None
    assert "no imagery under the maps: " in caplog.text and "a.tif" in caplog.text


def gone(path: Path, then: Callable[..., object]) -> Callable[..., object]:
    def act(*args: object, **kwargs: object) -> object:
        path.unlink()
        return then(*args, **kwargs)

    return act


def test_nothing_to_map_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--imagery or --store"):
        atlas.predict(FakeModel(), out=tmp_path / "maps")


# ---- the command line


def test_predict_by_name_photos_and_text_in_one_call(
    tmp_path: Path, checkpoint: Path, call: Callable[..., SimpleNamespace]
) -> None:
    path, out = scene(tmp_path / "a.tif"), tmp_path / "maps"
    ran = call(
        *("predict", checkpoint, "--imagery", path, "--out", out, "--json"),
        *("--bbox", ",".join(map(str, BBOX)), "--qgis-project"),
        *("--species", "quercus_lobata", "--text", "Fagaceae Quercus"),
        *(
            "--photo",
            photo(tmp_path / "p.jpg"),
            "--photo",
            photo(tmp_path / "q" / "r.png", 1).parent,
        ),
    )
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert set(result["maps"]) == {"quercus_lobata", "photo_p_and_1_more", "text_fagaceae_quercus"}
    for path in (*result["maps"].values(), result["html"], result["run"], result["item"]):
        assert Path(path).is_file()
    with zipfile.ZipFile(out / "maps.qgz") as project:
        text = project.read("maps.qgs").decode()
    assert all(f"./{stem}.tif" in text for stem in result["maps"])
    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 7
    assert record["bbox"]["bounds"] == list(BBOX)
    assert list(record["photos"]) == [str(tmp_path / "p.jpg"), str(tmp_path / "q" / "r.png")]
    again = call("predict", checkpoint, "--store", result["store"], "--out", tmp_path / "all", "-q")
    assert again.code == 0, again.err
    assert again.out.strip() == str(tmp_path / "all")
    assert again.err == ""
    with rasterio.open(tmp_path / "all/quercus_lobata.tif") as raster:
        assert raster.tags()["MODEL"] == open_store(result["store"]).identity.model


def test_embed_prints_its_store_and_fills_it_on_the_next_call(
    tmp_path: Path, checkpoint: Path, call: Callable[..., SimpleNamespace]
) -> None:
    path, out = scene(tmp_path / "a.tif"), tmp_path / "s.zarr"
    ran = call("embed", checkpoint, "--imagery", path, "--stride-px", 16, "--out", out)
    assert (ran.code, ran.out.strip()) == (0, str(out))
    assert "encoded 217 windows" in ran.err
    ran = call("embed", checkpoint, "--imagery", path, "--out", out)
    assert ran.code == 0
    assert "encoded" not in ran.err
    ran = call("embed", checkpoint, "--imagery", path, "--bands", "3,2,1", "--out", out)
    assert ran.code == 0  # the same bands, put in the model's order
    ran = call("embed", checkpoint, "--out", out)
    assert ran.code == 2


def bad_inputs(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Words after `predict MODEL --out maps`, and what the one line must say."""
    imagery = scene(folder / "scene.tif")
    homeless = folder / "homeless.tif"
    with rasterio.open(imagery) as raster:
        profile = {**raster.profile, "crs": None}
        with rasterio.open(homeless, "w", **profile) as copy:
            copy.write(raster.read())
    cut = folder / "cut.tif"
    cut.write_bytes(imagery.read_bytes()[:90_000])
    scene(folder / "two.tif", bands=2)
    (folder / "broken.jpg").write_text("no image")
    (folder / "empty").mkdir()
    good = ["--imagery", imagery]
    return {
        "no CRS": (["--imagery", homeless], "homeless.tif has no coordinate reference system"),
        "other bands": (
            ["--imagery", folder / "two.tif"],
            "two.tif has the bands red, green, the model was trained on red, green, blue",
        ),
        "truncated": (["--imagery", cut], "cut.tif"),
        "missing raster": (["--imagery", folder / "none.tif"], "none.tif does not exist"),
        "outside": ([*good, "--bbox", 10, 10, 11, 11], "misses the imagery, which covers -122.4"),
        "latitude first": (
            [*good, "--bbox", 37.764, -122.432, 37.765, -122.431],
            "did you mean --bbox -122.432 37.764 -122.431 37.765 ?",
        ),
        "empty box": ([*good, "--bbox", -122.1, 37.6, -122.6, 38], "is empty"),
        "unknown species": (
            [*good, "--species", "Quercus agrifola"],
            "did you mean 'Quercus agrifolia'",
        ),
        "missing photo": ([*good, "--photo", folder / "p.jpg"], "p.jpg does not exist"),
        "no photo": ([*good, "--photo", folder / "empty"], "empty holds no photo (.jpg, "),
        "broken photo": ([*good, "--photo", folder / "broken.jpg"], "broken.jpg cannot be read"),
        "missing store": (["--store", folder / "s.zarr"], "s.zarr does not exist"),
        "unknown band": ([*good, "--bands", "red,green,pink"], "has no band 'pink'"),
    }


CASES = (
    "no CRS",
    "other bands",
    "truncated",
    "missing raster",
    "outside",
    "latitude first",
    "empty box",
    "unknown species",
    "missing photo",
    "no photo",
    "broken photo",
    "missing store",
    "unknown band",
)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_gets_one_line_and_leaves_nothing(
    tmp_path: Path, checkpoint: Path, call: Callable[..., SimpleNamespace], case: str
) -> None:
    words, says = bad_inputs(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    ran = call("predict", checkpoint, "--out", tmp_path / "maps", *words)
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_output_is_kept_and_a_folder_that_is_no_model_is_named(
    tmp_path: Path, checkpoint: Path, call: Callable[..., SimpleNamespace]
) -> None:
    path = scene(tmp_path / "a.tif")
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps/notes.txt").write_text("mine")
    ran = call("predict", checkpoint, "--imagery", path, "--out", tmp_path / "maps")
    assert ran.code == 1
    assert ran.err == f"error: {tmp_path / 'maps'} exists already; pass --overwrite to replace it\n"
    assert (tmp_path / "maps/notes.txt").read_text() == "mine"
    for out in (path, tmp_path):
        ran = call("predict", checkpoint, "--imagery", path, "--out", out, "--overwrite")
        assert (ran.code, ran.out) == (1, "")
        assert f"the output {out} would replace the input {path}" in ran.err
    assert path.is_file()
    ran = call("predict", tmp_path, "--imagery", path, "--out", tmp_path / "new")
    assert (ran.code, ran.out) == (1, "")
    assert f"{tmp_path} is not a model" in ran.err


def test_a_truncated_raster_prints_one_line_in_a_process_of_its_own(
    tmp_path: Path, checkpoint: Path
) -> None:
    words, _ = bad_inputs(tmp_path)["truncated"]
    printed, said = tmp_path / "out.txt", tmp_path / "err.txt"
    words = ["predict", str(checkpoint), "--out", str(tmp_path / "maps"), *map(str, words)]
    assert ended(start(cli.main, words, out=printed, err=said)) == 1
    assert printed.read_text() == ""
    told = said.read_text()
    assert told.count("\n") == 1, told
    assert "cut.tif" in told
    assert not (tmp_path / "maps").exists()
