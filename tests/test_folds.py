"""Folds share no ground; background comes uniformly from where the imagery is valid."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from speciesmap.errors import ObservationsError
from speciesmap.observations.background import random_background, target_group
from speciesmap.observations.folds import separated, spatial_blocks
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
    with pytest.raises(ObservationsError, match="one fold id"):
        separated(x, x, [0, 1], 0, 10)


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
