"""Folds share no ground; background comes uniformly from where the imagery is valid."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from speciesmap.errors import ObservationsError
from speciesmap.observations.background import biased_background, random_background, target_group
from speciesmap.observations.folds import (
    fold_distances,
    kmeans_folds,
    knndm,
    nearest_fold,
    separated,
    spatial_blocks,
)
from speciesmap.rasters.imagery import Imagery, open_imagery
from speciesmap.rasters.windows import window_start

coordinates = st.floats(-1e5, 1e5, allow_nan=False, width=32)
places = st.lists(st.tuples(coordinates, coordinates), min_size=4, max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    points=places,
    block_m=st.floats(10, 5e4),
    folds=st.integers(2, 6),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_every_record_is_in_one_fold_and_no_block_is_split(
    points: list[tuple[float, float]], block_m: float, folds: int, seed: int, data: st.DataObject
) -> None:
    x, y = np.array(points).T
    weight = data.draw(st.lists(st.integers(0, 1), min_size=len(x), max_size=len(x)))
    blocks = np.unique(np.floor(np.array(points) / block_m), axis=0, return_inverse=True)[1]
    blocks = blocks.reshape(-1)
    loads = np.bincount(blocks, weights=weight)
    assume(np.count_nonzero(loads) >= folds)
    fold = spatial_blocks(x, y, block_m=block_m, folds=folds, seed=seed, weight=weight)
    assert fold.shape == x.shape
    assert set(fold) == set(range(folds)), "every fold can be tested"
    for block in np.unique(blocks):
        assert len(set(fold[blocks == block])) == 1
    in_fold = np.bincount(fold, weights=weight, minlength=folds)
    assert in_fold.min() >= 1
    assert in_fold.max() - in_fold.min() <= 2 * loads.max(), "balanced to within blocks"
    again = spatial_blocks(x, y, block_m=block_m, folds=folds, seed=seed, weight=weight)
    np.testing.assert_array_equal(fold, again)


def test_presences_are_balanced_and_the_seed_matters() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 40_000, (2, 3000))
    presence = (rng.random(3000) < 0.1).astype(float)
    folds = [spatial_blocks(x, y, block_m=4000, folds=5, seed=s, weight=presence) for s in range(3)]
    for fold in folds:
        counts = np.bincount(fold, weights=presence)
        assert counts.max() - counts.min() <= 8
    assert not np.array_equal(folds[0], folds[1])


@settings(max_examples=60, deadline=None)
@given(points=places, window_m=st.floats(1, 5e4), seed=st.integers(0, 9))
def test_no_training_window_overlaps_a_test_window(
    points: list[tuple[float, float]], window_m: float, seed: int
) -> None:
    x, y = np.array(points).T
    fold = np.random.default_rng(seed).integers(0, 3, len(x))
    for k in range(3):
        train = separated(x, y, fold, k, window_m)
        test = fold == k
        apart = np.maximum(np.abs(x[:, None] - x[test]), np.abs(y[:, None] - y[test]))
        overlaps = (apart < window_m).any(axis=1)
        np.testing.assert_array_equal(train, ~test & ~overlaps)


def test_folds_that_cannot_be_made_say_why() -> None:
    x = np.array([0.0, 1, 2, 5000])
    with pytest.raises(ObservationsError, match=r"only 2 blocks of 1000 m .* 3 folds"):
        spatial_blocks(x, x, block_m=1000, folds=3, seed=0)
    with pytest.raises(ObservationsError, match="at least 2"):
        spatial_blocks(x, x, block_m=1000, folds=1, seed=0)
    with pytest.raises(ObservationsError, match="above 0 m"):
        spatial_blocks(x, x, block_m=0, folds=2, seed=0)
    with pytest.raises(ObservationsError, match="row 2"):
        spatial_blocks(np.array([0, 1, np.inf]), np.zeros(3), block_m=1, folds=2, seed=0)
    with pytest.raises(ObservationsError, match="4 points"):
        spatial_blocks(x, x, block_m=1000, folds=2, seed=0, weight=[1, 2])
    for make in (kmeans_folds, partial(knndm, area_x_m=x, area_y_m=x)):
        with pytest.raises(ObservationsError, match="4 distinct places cannot make 5 folds"):
            make(x, x, folds=5, seed=0)
        with pytest.raises(ObservationsError, match="at least 2"):
            make(x, x, folds=1, seed=0)
    with pytest.raises(ObservationsError, match=r"no place|0 places"):
        knndm(x, x, [], [], folds=2, seed=0)
    with pytest.raises(ObservationsError, match="one fold id"):
        separated(x, x, [0, 1], 0, 10)


@settings(max_examples=40, deadline=None)
@given(points=places, folds=st.integers(2, 6), seed=st.integers(0, 9))
@example([(0, 0), (0, 1), (0, 99_992), (0, 0.00015), (0, 0)], 3, 0)
def test_clustered_and_matched_folds_hold_every_record_out_once(
    points: list[tuple[float, float]], folds: int, seed: int
) -> None:
    x, y = np.array(points).T
    assume(len(np.unique(np.array(points).round(), axis=0)) >= folds)
    area = np.random.default_rng(seed).uniform(-1e5, 1e5, (2, 50))
    matched = knndm(x, y, *area, folds=folds, seed=seed)
    clustered = kmeans_folds(x, y, folds=folds, seed=seed)
    for fold in (matched, clustered):
        assert fold.shape == x.shape
        assert set(fold) == set(range(folds)), "no fold is empty"
    np.testing.assert_array_equal(matched, knndm(x, y, *area, folds=folds, seed=seed))
    np.testing.assert_array_equal(clustered, kmeans_folds(x, y, folds=folds, seed=seed))
    np.testing.assert_array_equal(
        nearest_fold(x, y, np.arange(len(x)), x, y)[0], np.flatnonzero((x == x[0]) & (y == y[0]))[0]
    )


def clumps(rng: np.random.Generator, count: int = 300, wide_m: float = 300) -> np.ndarray:
    centres = rng.uniform(0, 20_000, (6, 2))
    return centres[rng.integers(0, 6, count)] + rng.normal(0, wide_m, (count, 2))


def test_matched_folds_are_as_far_from_training_as_the_map_is_from_records() -> None:
    """Clumped records in a wide area: random folds test far too near, matched ones do not."""
    rng = np.random.default_rng(0)
    points = clumps(rng)
    area = rng.uniform(0, 20_000, (2000, 2))
    wanted = np.median(cKDTree(points).query(area)[0])
    random = np.median(fold_distances(points, rng.integers(0, 5, len(points))))
    fold = knndm(*points.T, *area.T, folds=5, seed=0)
    matched = np.median(fold_distances(points, fold))
    assert random < 0.05 * wanted
    assert 0.5 * wanted < matched < 2 * wanted
    spread = rng.uniform(0, 20_000, (300, 2))
    fold = knndm(*spread.T, *area.T, folds=5, seed=0)
    wanted = np.median(cKDTree(spread).query(area)[0])
    assert 0.5 * wanted < np.median(fold_distances(spread, fold)) < 2 * wanted


def raster(path: Path, valid: np.ndarray) -> Imagery:
    height, width = valid.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=1, dtype="uint8",
        crs="EPSG:32611", transform=Affine(1, 0, 380_000, 0, -1, 3_760_000), nodata=0,
    ) as file:  # fmt: skip
        file.write(valid.astype(np.uint8), 1)
    return open_imagery(path)


def test_background_is_uniform_over_valid_pixels(tmp_path: Path) -> None:
    valid = np.zeros((90, 700), dtype=bool)
    valid[:, :100] = valid[:, 400:] = True
    imagery = raster(tmp_path / "a.tif", valid)
    window = 9
    rows, cols = random_background(imagery, 6000, window, np.random.default_rng(1), min_valid=0.6)
    assert rows.shape == cols.shape == (6000,)
    assert (rows % 1 == 0.5).all() and (cols % 1 == 0.5).all(), "pixel centres"
    assert len({*zip(rows, cols, strict=True)}) == 6000, "no place twice"
    share = []
    for row, col in zip(rows, cols, strict=True):
        top, left = window_start(row, col, window)
        inside = valid[max(top, 0) : top + window, max(left, 0) : left + window]
        assert valid[int(row), int(col)]
        share.append(inside.sum() / window**2)
    assert min(share) >= 0.6
    assert abs((cols < 100).mean() - 0.25) < 0.03
    assert abs((rows < 45).mean() - 0.5) < 0.03
    again = random_background(imagery, 6000, window, np.random.default_rng(1), min_valid=0.6)
    np.testing.assert_array_equal(again[0], rows)


def test_background_may_take_every_place_there_is_and_no_more(tmp_path: Path) -> None:
    valid = np.zeros((40, 50), dtype=bool)
    valid[10:20, 10:20] = True
    imagery = raster(tmp_path / "a.tif", valid)
    rng = np.random.default_rng(0)
    rows, cols = random_background(imagery, 100, 1, rng)
    assert {*zip(rows // 1, cols // 1, strict=True)} == {*map(tuple, np.argwhere(valid))}
    with pytest.raises(ObservationsError, match="only 100 of 101 background places"):
        random_background(imagery, 101, 1, rng)


def test_background_keeps_to_the_land(tmp_path: Path) -> None:
    imagery = raster(tmp_path / "a.tif", np.ones((60, 60), dtype=bool))
    rows, _ = random_background(
        imagery, 200, 5, np.random.default_rng(0), land=lambda rows, cols: rows > 30
    )
    assert rows.min() > 30


def test_background_follows_a_raster_of_effort_on_any_grid(tmp_path: Path) -> None:
    valid = np.ones((200, 300), dtype=bool)
    valid[:, :50] = False
    imagery = raster(tmp_path / "a.tif", valid)
    effort = np.array([[0, 1, 3, 2, 0, 0]] * 2, dtype=np.float32)
    with rasterio.open(
        tmp_path / "bias.tif", "w", driver="GTiff", width=6, height=2, count=1, dtype="float32",
        crs="EPSG:32611", transform=Affine(50, 0, 380_000, 0, -100, 3_760_000),
    ) as file:  # fmt: skip
        file.write(effort, 1)
    bias = open_imagery(tmp_path / "bias.tif")
    rows, cols = biased_background(imagery, 2000, 1, np.random.default_rng(0), bias)
    assert rows.shape == cols.shape == (2000,)
    assert len({*zip(rows, cols, strict=True)}) == 2000, "no place twice"
    share = np.bincount((cols // 50).astype(int), minlength=6) / 2000
    np.testing.assert_allclose(share, [0, 1 / 6, 1 / 2, 1 / 3, 0, 0], atol=0.04)
    with pytest.raises(ObservationsError, match="only 30000 of 30001 background places"):
        biased_background(imagery, 30_001, 1, np.random.default_rng(0), bias)
    with rasterio.open(tmp_path / "bias.tif", "r+") as file:
        file.write(-effort, 1)
    with pytest.raises(ObservationsError, match="holds -3 as an effort"):
        biased_background(imagery, 9, 1, np.random.default_rng(0), open_imagery(bias.source))


def test_target_group_keeps_the_most_certain_record_of_each_cell() -> None:
    rng = np.random.default_rng(0)
    longitude, latitude = -120 + rng.random(200) * 0.05, 37 + rng.random(200) * 0.05
    table = gpd.GeoDataFrame(
        pd.DataFrame(
            {
                "taxon": rng.choice(["Acer negundo", "Quercus lobata"], 200),
                "longitude": longitude,
                "latitude": latitude,
                "uncertainty_m": rng.choice([5.0, 50.0, np.nan], 200),
            }
        ),
        geometry=gpd.points_from_xy(longitude, latitude),
        crs="EPSG:4326",
    )
    chosen = target_group(table, 1000)
    grid = table.to_crs("EPSG:6933").geometry
    cell = list(zip(grid.x // 1000, grid.y // 1000, strict=True))
    assert len(chosen) == len(set(cell)) < len(table)
    best = table.assign(cell=cell).fillna(np.inf).groupby("cell")["uncertainty_m"].min()
    kept = chosen["uncertainty_m"].fillna(np.inf)
    assert [best[cell[k]] for k in chosen.index] == kept.tolist()
