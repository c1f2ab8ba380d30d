"""Rules of cleaning and thinning hold for any records; large and mixed files are read in pieces."""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod
from test_observations import EVERYTHING, META, OAK, plain, run, write_gbif, write_inat

from speciesmap.errors import ObservationsError
from speciesmap.observations import delimited
from speciesmap.observations.clean import Rules, clean, clean_files, country_centroids
from speciesmap.observations.read import read_observations, read_places
from speciesmap.observations.thin import apart, first_per_cell

RECORD = st.fixed_dictionaries(
    {
        "taxon": st.sampled_from(["Acer rubrum", "Acer negundo"]),
        "longitude": st.sampled_from([0.0, 1.0, 1.00001, 179.9999, -179.9999, 9.0]),
        "latitude": st.sampled_from([0.0, 51.0, 89.9999, -33.5]),
        "date": st.sampled_from(["1850-01-01", "2000-05-06", "2000-05-07", ""]),
        "uncertainty_m": st.sampled_from(["", "5", "301", "20000"]),
        "occurrenceStatus": st.sampled_from(["PRESENT", "absent", ""]),
        "basisOfRecord": st.sampled_from(["HUMAN_OBSERVATION", "FossilSpecimen"]),
        "captive": st.sampled_from(["true", "false"]),
        "obscured": st.sampled_from(["true", "false"]),
        "quality_grade": st.sampled_from(["research", "casual", ""]),
    }
)
SETTINGS = {
    "year_min": 1900, "uncertainty_max_m": 100.0, "cell_m": 1000.0, "thin_m": 5000.0,
}  # fmt: skip
RULES = [rule.name for rule in fields(Rules) if rule.name != "institutions"]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(RECORD, min_size=1, max_size=12), on=st.sets(st.sampled_from(RULES)))
def test_cleaning_accounts_for_every_row_and_cleaning_again_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], on: set[str]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    table = read_observations(path)
    rules = replace(EVERYTHING, **{name: SETTINGS.get(name, True) for name in on})
    kept, dropped = clean(table, rules)
    assert set(dropped) == on
    assert len(kept) + sum(dropped.values()) == len(table)
    assert set(kept["observation_id"]) <= set(table["observation_id"])
    assert sum(clean(kept, rules)[1].values()) == 0
    for rule in on:
        alone = replace(EVERYTHING, **{rule: SETTINGS.get(rule, True)})
        assert clean(kept, alone)[1] == {rule: 0}, "what is kept obeys each rule"


degrees = st.tuples(st.floats(-180, 180), st.floats(-90, 90))
near_by = st.tuples(st.floats(9.9, 10.1), st.floats(-0.1, 0.1))
across = st.tuples(st.sampled_from([179.99, -179.99, 180.0, -180.0]), st.floats(84.9, 85.1))


@settings(max_examples=80, deadline=None)
@given(
    places=st.lists(st.one_of(degrees, near_by, across), min_size=1, max_size=40),
    distance_m=st.floats(10, 50_000),
    seed=st.integers(0, 99),
)
def test_thinned_records_are_apart_and_no_more_are_dropped_than_must(
    places: list[tuple[float, float]], distance_m: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(places, columns=["longitude", "latitude"])
    table["taxon"] = rng.choice(["a", "b"], len(table))
    table["uncertainty_m"] = rng.choice([1.0, 10.0, np.nan], len(table))
    keep = apart(table, distance_m)
    geod = Geod(a=6_371_008.8, b=6_371_008.8)
    x, y = table["longitude"].to_numpy(), table["latitude"].to_numpy()
    certain = table["uncertainty_m"].fillna(np.inf).to_numpy()
    taxon = table["taxon"].to_numpy(dtype=object)
    for i in range(len(table)):
        others = np.flatnonzero(keep & (taxon == taxon[i]) & (np.arange(len(table)) != i))
        one = np.full(len(others), i)
        metres = geod.inv(x[one], y[one], x[others], y[others])[2]
        if keep[i]:
            assert (metres > distance_m * (1 - 1e-6)).all()
        else:
            close = others[metres < distance_m * (1 + 1e-6)]
            assert close.size and certain[close].min() <= certain[i]
    assert keep[certain.argmin()], "the most certain record stays"


def test_a_hundred_thousand_records_are_thinned_as_few_would_be() -> None:
    """Far-away records change nothing near by: buckets of the hashed grid are shared."""
    rng = np.random.default_rng(0)
    few = pd.DataFrame(
        {"longitude": rng.uniform(-122, -121.9, 500), "latitude": rng.uniform(37, 37.1, 500)}
    )
    many = pd.DataFrame(
        {"longitude": rng.uniform(0, 90, 100_000), "latitude": rng.uniform(-60, 60, 100_000)}
    )
    both = pd.concat([few, many], ignore_index=True)
    for table in (few, both):
        table["taxon"], table["uncertainty_m"] = "a", np.nan
    np.testing.assert_array_equal(apart(few, 800), apart(both, 800)[:500])
    assert 0 < apart(few, 800).sum() < 500


@pytest.mark.parametrize("distance_m", [0, -1, np.nan, np.inf, 2e7])
def test_a_distance_that_means_nothing_is_refused(distance_m: float) -> None:
    table = pd.DataFrame({"longitude": [1.0], "latitude": 1.0, "taxon": "a", "uncertainty_m": 1.0})
    with pytest.raises(ObservationsError, match="cannot be thinned"):
        apart(table, distance_m)
    if not distance_m > 0:
        with pytest.raises(ObservationsError, match="no area"):
            first_per_cell(table, distance_m)


def test_records_at_central_points_of_countries_and_at_institutions_go(tmp_path: Path) -> None:
    centroids = country_centroids()
    assert len(centroids) > 200
    assert ((centroids == (-97, 38)).all(1)).any(), "the United States"
    at = {"decimalLongitude": "-97.01", "decimalLatitude": "38.0"}
    beyond = {"decimalLongitude": "-97.03", "decimalLatitude": "38.0"}
    zoo = {"decimalLongitude": "-117.15", "decimalLatitude": "32.735"}
    institutions = plain(tmp_path / "zoos.csv", "name,latitude,longitude\nZoo,32.7353,-117.149\n")
    got = read_observations(write_gbif(tmp_path / "a.csv", at, beyond, zoo))
    kept, dropped = clean(got)
    assert dropped["centroids"] == 1 and kept["observation_id"].tolist() == ["1002", "1003"]
    kept, dropped = clean(got, Rules(institutions=institutions))
    assert dropped["institutions"] == 1 and kept["observation_id"].tolist() == ["1002"]


@pytest.mark.parametrize("rows_at_once", [3, 50_000])
def test_files_are_cleaned_in_pieces_as_they_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "decimalLatitude": f"{37 + rng.integers(0, 4) / 1000}",
            "occurrenceStatus": str(rng.choice(["PRESENT", "ABSENT"])),
            "eventDate": str(rng.choice(["2001-02-03", "2001-02-04"])),
            "coordinateUncertaintyInMeters": str(rng.choice(["", "10", "301"])),
            "datasetKey": str(rng.choice(["a-key", "b-key"])),
            "species": str(rng.choice(["Acer rubrum", "Acer negundo"])),
        }
        for _ in range(40)
    ]
    files = [write_gbif(tmp_path / "a.csv", *rows[:25]), write_gbif(tmp_path / "b.csv", *rows[25:])]
    rules = Rules(cell_m=10, thin_m=150)
    whole, dropped = clean(read_observations(files), rules)
    monkeypatch.setattr(delimited, "CHUNK_ROWS", rows_at_once)
    report = clean_files(files, tmp_path / "out.parquet", rules=rules, doi="10.15468/dl.abcdef")
    assert report["dropped"] == dropped and min(dropped["present"], dropped["thin_m"]) > 0
    assert (report["read"], report["kept"]) == (40, len(whole))
    assert report["doi"] == ["10.15468/dl.abcdef"]
    assert sum(report["sources"].values()) == len(whole)
    assert set(report["sources"]) <= {"a-key", "b-key"}
    written = read_observations(tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(pd.DataFrame(written), pd.DataFrame(whole))
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"a.csv", "b.csv", "out.parquet", "out.report.json"}


def test_strays_of_windows_1252_in_a_utf_8_file_are_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b"species\tlatitude\tlongitude\tobserver"]
    lines += ["Acer rubrum\t1\t2\tJosé Ñandú 木".encode()] * 3
    lines += ["Acer rubrum\t1\t2\tJos\u00e9 \u2019t Hooft".encode("cp1252")] * 2
    (tmp_path / "a.csv").write_bytes(b"\n".join([*lines, *lines[1:4]]) + b"\n")
    with caplog.at_level(logging.WARNING, "speciesmap"):
        got = read_observations(tmp_path / "a.csv")
    utf8, strays = "José Ñandú 木", "José \u2019t Hooft"
    assert got["observer"].tolist() == [utf8] * 3 + [strays] * 2 + [utf8] * 3
    assert "2 lines not UTF-8 read as Windows-1252, the first is line 5" in caplog.text
    (tmp_path / "b.csv").write_bytes("species,latitude,longitude\nAcer é,1,2\n".encode("latin-1"))
    assert read_observations(tmp_path / "b.csv")["taxon"].tolist() == ["Acer é"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    st.integers(1, 9),
)
def test_mending_keeps_valid_lines_as_they_are_and_makes_all_valid(
    lines: list[bytes], block: int
) -> None:
    import io

    before = delimited.BLOCK_BYTES
    delimited.BLOCK_BYTES = block
    try:
        stream = delimited.Utf8(io.BytesIO(b"\n".join(lines)), "it")
        mended = b"".join(iter(lambda: stream.read(5), b""))
    finally:
        delimited.BLOCK_BYTES = before
    result = mended.split(b"\n")
    assert len(result) == max(len(lines), 1)
    for old, new in zip(lines, result, strict=False):
        new.decode()
        try:
            old.decode()
            assert new == old
        except UnicodeDecodeError:
            assert new != old


def test_a_file_cut_off_or_a_lost_quotation_mark_is_refused_with_its_line(tmp_path: Path) -> None:
    whole = write_gbif(tmp_path / "a.csv", *[{}] * 4).read_bytes()
    (tmp_path / "a.csv").write_bytes(whole[:-120])
    with pytest.raises(ObservationsError, match=r"ends in the middle of line 5, which has \d+ of"):
        read_observations(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(whole.rstrip(b"\n"))
    assert len(read_observations(tmp_path / "a.csv")) == 4, "a last line may lack its end only"
    row = 'Acer rubrum,37,-122,"a, b"\n'
    text = "species,latitude,longitude,remark\n" + row + 'Acer rubrum,37,-122,"lost\n'
    plain(tmp_path / "b.csv", text + "Acer rubrum,37,-122,plain words\n" * 80_000)
    with pytest.raises(ObservationsError, match="quotation mark opened after line 3 is not"):
        read_observations(tmp_path / "b.csv")


def test_what_users_take_for_a_table_is_named(tmp_path: Path) -> None:
    page = plain(tmp_path / "gbif.csv", "<!DOCTYPE html>\n<html><body>Log in</body></html>")
    with pytest.raises(ObservationsError, match="is a web page"):
        read_observations(page)
    (tmp_path / "a.csv").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600))
    with zipfile.ZipFile(tmp_path / "b.csv", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    for name in ("a.csv", "b.csv"):
        with pytest.raises(ObservationsError, match="is an Excel workbook; save its sheet as CSV"):
            read_observations(tmp_path / name)


def test_a_table_of_one_endless_line_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("wb") as file:
        file.write(b"species,latitude,longitude\n")
        file.write(b"x" * (delimited.LONGEST_LINE_BYTES + 2 * delimited.BLOCK_BYTES))
    with pytest.raises(ObservationsError, match="line 2 is longer than 16 MiB"):
        read_observations(tmp_path / "a.csv")


def test_an_archives_doi_and_each_photos_licence_are_kept_for_citation(tmp_path: Path) -> None:
    core = "gbifID\tlat\tlon\tname\tw\ts\n"
    core += "".join(f"{k}\t37.{k}\t-122.1\tArbutus menziesii\t\t\n" for k in range(3))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("meta.xml", META)
        archive.writestr("occurrence.txt", core)
        archive.writestr(
            "multimedia.txt",
            "gbifID,type,identifier,license\n0,StillImage,u1,CC0\n0,StillImage,u2,CC-BY\n"
            "2,StillImage,u3,CC-BY\n",
        )
        archive.writestr("metadata.xml", "<eml>https://doi.org/10.15468/DL.x7y2z9</eml>")
    report = clean_files([tmp_path / "a.zip"], tmp_path / "out.parquet")
    assert report["doi"] == ["10.15468/dl.x7y2z9"]
    assert report["photo_licenses"] == {"CC-BY": 2, "CC0": 1}
    assert report["licenses"] == {"CC0": 3}
    assert json.loads((tmp_path / "out.report.json").read_text()) == report


def test_archives_read_as_python_dwca_reader_reads_them(tmp_path: Path) -> None:
    dwca = pytest.importorskip("dwca.read")
    core = "gbifID\tlat\tlon\tname\tw\ts\n"
    core += "".join(f"{k}\t{k / 8}\t-{k / 4}\tArbutus menziesii\t\t\n" for k in range(1, 30))
    photos = "gbifID,type,identifier,license\n"
    photos += "".join(f'{k % 30},StillImage,"https://h/{k},x.jpg",CC{k}\n' for k in range(3, 70))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("meta.xml", META.replace('metadata="metadata.xml"', ""))
        archive.writestr("occurrence.txt", core)
        archive.writestr("multimedia.txt", photos)
    got = read_observations(tmp_path / "a.zip").set_index("observation_id")
    term, media = "http://rs.tdwg.org/dwc/terms/", "http://purl.org/dc/terms/"
    with dwca.DwCAReader(str(tmp_path / "a.zip")) as reader:
        rows = list(reader)
        assert [row.id for row in rows] == got.index.tolist()
        for row in rows:
            ours = got.loc[row.id]
            assert float(row.data[term + "decimalLatitude"]) == ours["latitude"]
            assert float(row.data[term + "decimalLongitude"]) == ours["longitude"]
            addresses = [e.data[media + "identifier"] for e in row.extensions]
            assert ours["photo"] == " | ".join(addresses)
            terms = [e.data[media + "license"] for e in row.extensions]
            assert ours["photo_license"] == " | ".join(terms)


def test_background_files_need_no_taxon_and_zeros_count(tmp_path: Path) -> None:
    text = "x1,presence,latitude,longitude,obscured,uncertainty_m\n"
    rows = ["a,1,1,2,,", "a,0,3,4,,", "a,0,5,6,true,", "a,0,7,8,,900", "a,0,9,,,"]
    path = plain(tmp_path / "a.csv", text + "\n".join(rows) + "\n")
    longitude, latitude = read_places(path)
    assert (longitude.tolist(), latitude.tolist()) == ([4.0, 8.0], [3.0, 7.0])
    assert read_places(path, uncertainty_max_m=100)[0].tolist() == [4.0]
    gbif = write_gbif(tmp_path / "b.csv", {}, {"occurrenceStatus": "ABSENT"})
    assert read_places(gbif)[0].tolist() == [-122.25, -122.25], "records of the group, seen or not"
    plain(path, text + "a,1,1,2,,\n")
    with pytest.raises(ObservationsError, match="no place to use as background among 1 rows"):
        read_places(path)
    plain(path, text + "a,maybe,1,2,,\n")
    with pytest.raises(ObservationsError, match=r"row 1 \(maybe\): presence is neither 1 nor 0"):
        read_places(path)


def test_the_command_thins_and_cites(tmp_path: Path) -> None:
    gbif = write_gbif(
        tmp_path / "a.csv", {}, {}, {"decimalLatitude": "37.5005"}, {"decimalLatitude": "37.6"}
    )
    out = tmp_path / "out.parquet"
    words = ("--thin-m", "100", "--doi", "10.15468/dl.abc123", "--json", "-q")
    result = run(gbif, write_inat(tmp_path / "b.csv", {}), "--out", out, *words)
    report = json.loads(result.stdout)
    assert report["dropped"]["duplicates"] == 1
    assert report["dropped"]["thin_m"] == 1
    assert report["doi"] == ["10.15468/dl.abc123"]
    assert report["sources"] == {OAK["datasetKey"]: 2, "b.csv": 1}
