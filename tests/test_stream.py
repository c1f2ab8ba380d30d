"""A stream gives every row once, to one consumer, in an order that goes on where it stopped."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forks import server
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from speciesmap.config import DataConfig, load_config
from speciesmap.datasets.columns import FRACTIONS
from speciesmap.datasets.images import ImageFiles
from speciesmap.datasets.nature_multi_view import (
    chosen_rows,
    lineage_of,
    read_taxonomy,
    remote_files,
    unrepeated,
)
from speciesmap.datasets.paired import open_paired
from speciesmap.datasets.stream import Stream
from speciesmap.errors import ConfigError, DatasetError
from speciesmap.learning import streaming
from speciesmap.learning.data import PairedRows
from speciesmap.learning.modules import Crisp
from speciesmap.learning.sources import open_sources
from speciesmap.learning.streaming import StreamedBatches
from speciesmap.learning.train import train
from speciesmap.models import load_model, read_facts
from speciesmap.models.crisp import to_square

ROWS, BANDS, SIDE = 60, 4, 16
NAMES = ("Quercus agrifolia", "Acer negundo", "Salvia mellifera")
ANCESTRY = ("47126/47851/47853", "47126/47729/47726", "47126/48623/57130")
TAXONOMY = {
    47126: ("kingdom", "Plantae"),
    47851: ("family", "Fagaceae"),
    47853: ("genus", "Quercus"),
    47729: ("family", "Sapindaceae"),
    47726: ("genus", "Acer"),
    48623: ("family", "Lamiaceae"),
    57130: ("genus", "Salvia"),
    999: ("subtribe", "Salviinae"),
}


def jpeg(tone: int) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (40, 30), (tone, 20, 30)).save(stored, "JPEG")
    return stored.getvalue()


def pixels() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, 256, (ROWS, BANDS, SIDE, SIDE))


def nature_multi_view(folder: Path, groups: tuple[int, ...] = (7, 4)) -> Path:
    """Two splits of files in the true schema, of observations with two photos each."""
    species = np.arange(ROWS) // 2 % len(NAMES)
    photo = [{"bytes": jpeg(4 * k), "path": f"{k}.jpg"} for k in range(ROWS)]
    order = np.random.default_rng(1).permutation(ROWS)
    columns: dict[str, Any] = {
        "observation_uuid": [f"uuid-{k // 2}" for k in range(ROWS)],
        "latitude": pa.array(36 + np.arange(ROWS) // 2 / 100, pa.float32()),
        "longitude": pa.array(-120 + np.arange(ROWS) // 2 / 100, pa.float32()),
        "positional_accuracy": pa.array(np.full(ROWS, 10), pa.int64()),
        "taxon_id": pa.array(species + 100, pa.int64()),
        "quality_grade": ["research"] * ROWS,
        "gl_image_date": ["2018-05-01"] * ROWS,
        "ancestry": [ANCESTRY[k] for k in species],
        "rank": ["species"] * ROWS,
        "name": [NAMES[k] for k in species],
        "gl_inat_id": [str(k // 2) for k in range(ROWS)],
        "gl_photo_id": pa.array(np.arange(ROWS), pa.int64()),
        "license": ["CC0"] * ROWS,
        "observer_id": ["1"] * ROWS,
        "rs_classification": [k % 2 == 0 for k in range(ROWS)],
        "ecoregion": ["coast"] * ROWS,
        "supervised": [k % 6 < 4 for k in range(ROWS)],
        **{f"finetune_{p}percent": (order < float(p) / 100 * ROWS).tolist() for p in FRACTIONS},
        "rs_image_date": ["2018-07-01"] * ROWS,
        "gl_image": pa.array(photo, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "rs_image": pa.array(pixels().tolist(), pa.list_(pa.list_(pa.list_(pa.int64())))),
    }
    table = pa.table(columns)
    (folder / "data").mkdir(parents=True)
    for name, part, rows in (
        ("train-00000-of-00002", table.slice(0, 25), groups[0]),
        ("train-00001-of-00002", table.slice(25, 25), groups[1]),
        ("validation-00000-of-00001", table.slice(50), 5),
    ):
        pq.write_table(part, folder / "data" / f"{name}.parquet", row_group_size=rows)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nature_multi_view(tmp_path_factory.mktemp("hub") / "nmv")


@settings(max_examples=40, deadline=None)
@given(
    consumers=st.integers(1, 4),
    batch_size=st.integers(1, 6),
    buffer_rows=st.integers(1, 80),
    epoch=st.integers(0, 5),
    rows=st.sets(st.integers(0, ROWS - 1), min_size=30),
)
def test_consumers_share_the_rows_evenly_and_none_comes_twice(
    hub: Path, consumers: int, batch_size: int, buffer_rows: int, epoch: int, rows: set[int]
) -> None:
    chosen = np.array(sorted(rows))
    stream = Stream(open_paired(hub), chosen, batch_size, buffer_rows, seed=3)
    parts = [stream.order(epoch, k, consumers) for k in range(consumers)]
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == len(together)
    assert set(together.tolist()) <= rows
    assert {len(part) for part in parts} == {stream.batches(consumers) * batch_size}
    assert len(rows) - len(together) < consumers * (batch_size + 1)
    assert np.array_equal(stream.order(epoch, 0, consumers), parts[0])


def test_epochs_and_seeds_differ_and_a_buffer_mixes_row_groups(hub: Path) -> None:
    data, rows = open_paired(hub), np.arange(ROWS)
    orders = [
        tuple(Stream(data, rows, 5, 40, seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    plain = Stream(data, rows, 5, 1, 0).order(0)
    assert np.count_nonzero(np.diff(plain) == 1) > 40, "without a buffer, groups stay together"
    assert np.count_nonzero(np.diff(orders[0]) == 1) < 15


def test_images_belong_to_their_rows_and_each_group_is_read_once(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = ImageFiles.read

    def spy(files: ImageFiles, group: int, rows: Any) -> Any:
        read.append(group)
        return original(files, group, rows)

    monkeypatch.setattr(ImageFiles, "read", spy)
    data = open_paired(hub)
    stream = Stream(data, np.arange(ROWS), 6, 20, seed=0)
    batches = list(stream.read(epoch=0))
    for rows, windows, photos in batches:
        assert windows.dtype == np.uint8
        assert np.array_equal(windows, pixels()[rows])
        assert photos == [jpeg(4 * int(row)) for row in rows]
    assert sorted(read) == list(range(len(data.files.group_rows)))
    read.clear()
    rest = list(stream.read(epoch=0, start=8))
    assert np.array_equal(
        np.concatenate([b[0] for b in rest]), batches[8][0].tolist() + batches[9][0].tolist()
    )
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(rest, batches[8:], strict=True))
    assert len(read) < len(data.files.group_rows), "what was seen is not read again"


def loader(hub: Path, **changes: Any) -> StreamedBatches:
    data = open_paired(hub, "train")
    rows = PairedRows(data, np.arange(len(data)), data.taxa, image_px=16)
    options: dict[str, Any] = {"batch_size": 4, "buffer_rows": 10, "seed": 0}
    return StreamedBatches(rows, **{**options, **changes})


def places(batches: Any) -> list[list[float]]:
    return [batch["aerial"].double().mean((1, 2, 3)).tolist() for batch in batches]


def test_a_loader_goes_on_at_the_same_row_in_the_same_epoch(hub: Path) -> None:
    first = loader(hub)
    whole = [places(first) for _ in range(3)]
    assert len({json.dumps(epoch) for epoch in whole}) == 3
    assert [len(epoch) for epoch in whole] == [len(first)] * 3 == [12] * 3
    stopped = loader(hub)
    next(iter(places(stopped)))
    begun = iter(stopped)
    given = places(next(begun) for _ in range(5))
    assert given == whole[1][:5]
    resumed = loader(hub)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert places(resumed) == whole[1][5:]
    assert places(resumed) == whole[2]


def test_a_state_at_the_end_of_an_epoch_begins_the_next(hub: Path) -> None:
    first = loader(hub)
    whole = [places(first) for _ in range(2)]
    resumed = loader(hub)
    resumed.load_state_dict({"epoch": 0, "given": 12})
    assert places(resumed) == whole[1]


def test_workers_and_processes_share_an_epoch_and_go_on_in_turn(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = streaming.DataLoader

    def forked(*words: Any, **options: Any) -> Any:
        return spawned(*words, **{**options, "multiprocessing_context": server()})

    seen: list[float] = []
    for rank in range(2):
        mine = loader(hub, rank=rank, world=2, workers=2)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "DataLoader", forked)  # need not import everything
            batches = places(mine)
        assert len(batches) == len(mine) == 2 * (50 // 4 // 4)
        seen += [value for batch in batches for value in batch]
    resumed = loader(hub, rank=1, world=2, workers=2)
    resumed.load_state_dict({"epoch": 0, "given": 3})
    assert places(resumed) == batches[3:]
    assert len(set(seen)) == len(seen) == 48


def test_a_streamed_batch_is_the_batch_of_its_rows(hub: Path) -> None:
    mine = loader(hub)
    order = mine.stream.order(0)[:4]
    batch = next(iter(mine))
    wanted = mine.rows.__getitems__(order.tolist())
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    photos = mine.rows.dataset.ground(order)
    assert torch.equal(batch["ground"], to_square([p for p in photos if p], 16))


def test_too_many_consumers_are_refused(hub: Path) -> None:
    with pytest.raises(DatasetError, match="50 rows, too few for batches of 4 in 20 processes"):
        len(loader(hub, rank=0, world=20))


def test_an_address_streams_and_its_facts_are_kept(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for file in (hub / "data").iterdir():
        memory.pipe(f"/nmv/data/{file.name}", file.read_bytes())
    address = "memory://nmv"
    assert len(remote_files(address)) == 3
    data = open_paired(address, "train")
    local = open_paired(hub, "train")
    pd.testing.assert_frame_equal(data.facts, local.facts)
    assert (data.window_px, data.bands, data.taxa) == (local.window_px, local.bands, local.taxa)
    for mine, wanted in zip(
        Stream(data, np.arange(50), 5, 10, 0).read(0),
        Stream(local, np.arange(50), 5, 10, 0).read(0),
        strict=True,
    ):
        assert np.array_equal(mine[1], wanted[1])
        assert mine[2] == wanted[2]
    kept = list(tmp_path.rglob("*.parquet"))
    assert len(kept) == 2
    again = open_paired(address, "train")
    pd.testing.assert_frame_equal(again.facts, local.facts)
    with pytest.raises(DatasetError, match=r"its images can only be streamed, .* pretrain"):
        data.aerial([0])
    with pytest.raises(DatasetError, match=r"memory://nothing .*"):
        open_paired("memory://nothing")
    memory.rm("/nmv", recursive=True)


def test_splits_are_read_apart(hub: Path) -> None:
    assert [len(open_paired(hub, split)) for split in ("train", "validation", None)] == [50, 10, 60]
    with pytest.raises(DatasetError, match="split 'test'; choose one of train, validation"):
        open_paired(hub, "test")


def test_a_split_is_told_inside_the_data_set_and_once(hub: Path, tmp_path: Path) -> None:
    """A folder of that name above it is none, and folder and name must agree."""
    inside = tmp_path / "train" / "nmv"
    shutil.copytree(hub, inside)
    assert [len(open_paired(inside, split)) for split in ("train", "validation")] == [50, 10]
    (single,) = (inside / "data").glob("validation-*")
    assert len(open_paired(single, "validation")) == 10
    (inside / "validation").mkdir()
    first = next((inside / "data").glob("train-*"))
    first.rename(inside / "validation" / first.name)
    for split in ("train", "validation"):
        with pytest.raises(DatasetError, match=r"is of train and validation by its folder and na"):
            open_paired(inside, split)


def test_rows_are_chosen_by_the_columns_of_nature_multi_view(hub: Path) -> None:
    facts = open_paired(hub).facts
    assert chosen_rows(facts, hub).all()
    once = chosen_rows(facts, hub, one_per_observation=True)
    assert once.sum() == facts["observation_uuid"].nunique() == 30
    assert chosen_rows(facts, hub, supervised=True).sum() == 40
    counts = [chosen_rows(facts, hub, percent=float(p)).sum() for p in FRACTIONS]
    assert counts == sorted(counts)
    assert counts[-1] == ROWS
    both = chosen_rows(facts, hub, one_per_observation=True, percent=20)
    assert np.array_equal(both, once & chosen_rows(facts, hub, percent=20.0))
    with pytest.raises(DatasetError, match=r"no share of 3 percent; choose one of 0\.25, 0\.5"):
        chosen_rows(facts, hub, percent=3)
    with pytest.raises(DatasetError, match="has no column 'supervised'"):
        chosen_rows(facts.drop(columns="supervised"), hub, supervised=True)


def test_a_photo_that_comes_twice_is_taken_once_and_counted(
    hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    doubled = tmp_path / "doubled" / "data"
    shutil.copytree(hub / "data", doubled)
    shutil.copy(doubled / "train-00001-of-00002.parquet", doubled / "train-2.parquet")
    once = open_sources(DataConfig(dataset=str(hub)))
    twice = open_sources(DataConfig(dataset=str(doubled.parent)))
    assert twice.dataset is not None
    assert len(twice.dataset) == ROWS + 25
    assert len(twice.rows) == len(once.rows) == ROWS
    assert "25 rows left out that repeat a photo of their observation" in caplog.text
    assert "does not tell which rows are of one observation" not in caplog.text
    unnumbered = twice.dataset.facts.assign(gl_photo_id=0)
    assert unrepeated(unnumbered, doubled).all(), "nothing tells that they are the same"


def test_rows_without_a_name_are_said_to_lack_one(hub: Path, tmp_path: Path) -> None:
    file = next((hub / "data").glob("validation-*"))
    table = pq.read_table(file)
    nameless = table.drop_columns(["name"]).append_column("name", pa.array([""] * len(table)))
    pq.write_table(nameless, tmp_path / "validation-0.parquet")
    with pytest.raises(ConfigError, match=r"no row of .* names a taxon .*; fill the column `name`"):
        open_sources(DataConfig(dataset=str(tmp_path)))


def test_rows_of_unknown_observations_are_said_to_be_unchecked(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = open_paired(hub).facts.assign(observation_uuid="")
    assert unrepeated(facts, "the data").all()
    assert "nor observations that two splits share; overlapping windows can" in caplog.text


def taxonomy(folder: Path, separator: str = ",") -> Path:
    path = folder / "taxa.csv"
    lines = [separator.join(("taxon_id", "rank", "name", "active"))]
    lines += [separator.join((str(k), rank, name, "t")) for k, (rank, name) in TAXONOMY.items()]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_taxonomy_turns_numbers_into_lineages(hub: Path, tmp_path: Path, separator: str) -> None:
    table = taxonomy(tmp_path, separator)
    assert read_taxonomy(table) == TAXONOMY
    taxa = {taxon.name: taxon for taxon in open_paired(hub, taxonomy=table).taxa}
    assert taxa["Quercus agrifolia"].lineage == ("Plantae", "Fagaceae", "Quercus")
    assert taxa["Salvia mellifera"].prompt() == "Plantae Lamiaceae Salvia mellifera"
    assert lineage_of("47126/999/57130", TAXONOMY) == ("Plantae", "Salvia")
    assert lineage_of("47126/5", TAXONOMY) == ("Plantae",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taxon_id,name\n1,Plantae\n", "has no column 'rank'"),
        ("taxon_id,rank,name\n1,genus,A\n1,genus,B\n", "lists taxon 1 twice"),
        ("", "cannot be read"),
    ],
)
def test_a_taxonomy_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "taxa.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_taxonomy(tmp_path / "taxa.csv")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_taxonomy(tmp_path / "none.csv")


def crisp(hub: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "pretrain",
        "data": {
            "dataset": str(hub),
            "split": "train",
            "window_px": 12,
            "stream": {"buffer_rows": 20, "save_steps": 2},
        },
        "model": {
            "dim": 16,
            "aerial": {"backbone": "test_resnet"},
            "ground": {"backbone": "test_resnet", "image_px": 16},
        },
        "optim": {"epochs": 2, "batch_size": 8},
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true"},
    }
    return {**base, **changes}


def test_a_streamed_run_resumes_mid_epoch_and_ends_with_the_same_weights(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(crisp(hub))
    seen: list[list[float]] = []
    original = Crisp.training_step
    stop_at: int | None = None

    class Interrupted(Exception):
        pass

    def training_step(self: Crisp, batch: Any, index: int) -> Tensor:
        if len(seen) == stop_at:
            raise Interrupted
        seen.append(batch["aerial"].double().mean((1, 2, 3)).tolist())
        return original(self, batch, index)

    monkeypatch.setattr(Crisp, "training_step", training_step)
    whole = load_model(train(config, tmp_path / "whole")).state_dict()
    assert load_model(tmp_path / "whole").window_px == 12
    assert read_facts(tmp_path / "whole")["metrics"]["steps"] == 12
    unbroken = list(seen)
    seen.clear()
    stop_at = 9  # a state was saved after step 8, the second of the second epoch
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    assert seen == unbroken[:9]
    seen.clear()
    stop_at = None
    torch.rand(3)
    resumed = load_model(train(config, tmp_path / "run", resume=True)).state_dict()
    assert seen == unbroken[8:]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_without_a_choice_left_and_places_that_cannot_be_kept_together_are_refused(
    hub: Path, tmp_path: Path
) -> None:
    data = {"dataset": str(hub), "split": "validation", "percent": 0.25}
    with pytest.raises(ConfigError, match=r"no rows left by data\.one_per_observation"):
        open_sources(load_config(crisp(hub, data=data)).data)
    together = crisp(hub, contrastive={"same_place": "positive"})
    with pytest.raises(ConfigError, match="cannot keep rows of one place"):
        train(load_config(together), tmp_path / "run")


NATURE_MULTI_VIEW = Path(__file__).parent.parent / "configs" / "crisp_nmv.yaml"


def small(hub: Path) -> list[str]:
    """Changes that make its configuration fit the tests' rows."""
    tiny = "{backbone: test_vit, kwargs: {patch_size: 4}"
    return [
        f"data.dataset={hub}",
        "data.window_px=12",
        "data.stream.buffer_rows=16",
        "model.dim=16",
        f"model.aerial={tiny}, mean: [123.9, 127.0, 113.1, 131.4], std: [41.7, 36.4, 28.6, 39.3]}}",
        f"model.ground={tiny}, image_px: 16}}",
        "model.text={width: 16, layers: 1, heads: 2}",
    ]


def test_the_configuration_of_nature_multi_view_trains_on_rows_in_its_schema(
    hub: Path, tmp_path: Path
) -> None:
    changes = [
        *small(hub),
        "optim={epochs: 1, batch_size: 24, chunk_size: 10}",
        "trainer={accelerator: cpu, devices: 1, workers: 0}",
    ]
    run = train(load_config(NATURE_MULTI_VIEW, changes), tmp_path / "run")
    assert read_facts(run)["metrics"]["steps"] == 2
    model = load_model(run)
    assert model.architecture.mean == (123.9, 127.0, 113.1, 131.4)
    assert len(model.reference) == 48, "as many windows as the batches of an epoch hold"


def test_two_processes_that_start_together_train_one_model(hub: Path, tmp_path: Path) -> None:
    changes = [
        *small(hub),
        "optim={epochs: 1, batch_size: 12, chunk_size: 10}",
        "trainer={accelerator: cpu, devices: 2, workers: 0, precision: 32-true}",
    ]
    program = str(Path(sys.executable).with_name("speciesmap"))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--no-python", program, "train", str(NATURE_MULTI_VIEW), "--resume"]
    words += ["--out", str(tmp_path / "run"), *(w for c in changes for w in ("--set", c))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(str(tmp_path / "run")) == 1
    assert read_facts(tmp_path / "run")["metrics"]["steps"] == 2
    assert load_model(tmp_path / "run").architecture.dim == 16
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("told", ["before the run", "by its launcher"])
def test_the_learning_rate_falls_to_the_end_of_a_process_whoever_starts_it(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """torchrun says how many processes there are at once, Lightning's launcher only later."""
    rates: list[float] = []

    def fit(stage: Crisp, loader: StreamedBatches, *_: Any) -> Any:
        monkeypatch.setenv("WORLD_SIZE", "2")
        stage._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
        factor = stage.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
        assert len(loader) == 12
        rates.extend(factor(step) for step in range(2 * len(loader)))
        raise InterruptedError

    monkeypatch.setattr("speciesmap.learning.pretrain.fit", fit)
    monkeypatch.setenv("WORLD_SIZE", "2" if told == "before the run" else "1")
    config = load_config(crisp(hub, optim={"epochs": 2, "batch_size": 2, "warmup": 0}))
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run")
    assert rates[0] == 1
    assert rates[12] == pytest.approx(0.5, abs=0.1)
    assert 0 < rates[-1] < 0.1


def test_damaged_images_of_a_stream_are_named(hub: Path, tmp_path: Path) -> None:
    shutil.copytree(hub, tmp_path / "nmv")
    file = next((tmp_path / "nmv" / "data").glob("train-00000*"))
    whole, data = file.read_bytes(), open_paired(tmp_path / "nmv")
    group = pq.ParquetFile(file).metadata.row_group(0)
    columns = [group.column(k) for k in range(group.num_columns)]
    pages = next(c for c in columns if c.path_in_schema.startswith("rs_image."))
    start, size = pages.dictionary_page_offset, pages.total_compressed_size
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(pages.data_page_offset, start + size, 4):
            damaged[place] ^= int(rng.integers(1, 255))
        file.write_bytes(damaged)
        try:
            data.files.read(0, np.arange(3))
        except DatasetError as error:
            refused += 1
            assert str(file) in str(error)
            assert "\n" not in str(error)
    assert refused > 0
