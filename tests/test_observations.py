"""Records are recognised by content, cleaned by stated rules, and defects are named by row."""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from speciesmap.cli.observations import command
from speciesmap.errors import ObservationsError, OutputError
from speciesmap.observations import delimited
from speciesmap.observations.clean import Rules, clean, clean_files
from speciesmap.observations.read import COLUMNS, read_observations
from speciesmap.taxa import scientific_name

INAT_CALIFORNIA = Path(__file__).parents[2] / "shared/data/inat_california/observations.csv"

GBIF_HEADER = """
gbifID datasetKey occurrenceID kingdom phylum class order family genus species
infraspecificEpithet taxonRank scientificName verbatimScientificName
verbatimScientificNameAuthorship countryCode locality stateProvince occurrenceStatus
individualCount publishingOrgKey decimalLatitude decimalLongitude coordinateUncertaintyInMeters
coordinatePrecision elevation elevationAccuracy depth depthAccuracy eventDate day month year
taxonKey speciesKey basisOfRecord institutionCode collectionCode catalogNumber recordNumber
identifiedBy dateIdentified license rightsHolder recordedBy typeStatus establishmentMeans
lastInterpreted mediaType issue
"""
GBIF_COLUMNS = GBIF_HEADER.split()

OAK = {
    "gbifID": "1001",
    "datasetKey": "50c9509d-22c7-4a22-a47d-8c48425ef4a7",
    "kingdom": "Plantae",
    "phylum": "Tracheophyta",
    "class": "Magnoliopsida",
    "order": "Fagales",
    "family": "Fagaceae",
    "genus": "Quercus",
    "species": "Quercus agrifolia",
    "taxonRank": "SPECIES",
    "scientificName": "Quercus agrifolia Née",
    "locality": 'Camp "Oak',  # GBIF does not quote: a lone quotation mark is a letter
    "occurrenceStatus": "PRESENT",
    "decimalLatitude": "37.5",
    "decimalLongitude": "-122.25",
    "coordinateUncertaintyInMeters": "12.0",
    "eventDate": "2019-05-04T10:12",
    "basisOfRecord": "HUMAN_OBSERVATION",
    "license": "CC_BY_NC_4_0",
    "recordedBy": "A. Person",
    "mediaType": "StillImage",
}
assert len(GBIF_COLUMNS) == 50


def write_gbif(path: Path, *rows: dict[str, str], lower: bool = False) -> Path:
    header = [c.lower() for c in GBIF_COLUMNS] if lower else GBIF_COLUMNS
    lines = ["\t".join(header)]
    for k, row in enumerate(rows):
        record = {**OAK, "gbifID": str(1001 + k), **row}
        lines.append("\t".join(record.get(c, "") for c in GBIF_COLUMNS))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


INAT_HEADER = """
id uuid observed_on quality_grade license url image_url captive_cultivated latitude longitude
positional_accuracy public_positional_accuracy geoprivacy taxon_geoprivacy coordinates_obscured
scientific_name common_name iconic_taxon_name taxon_id
"""
INAT_COLUMNS = INAT_HEADER.split()

LILY = {
    "id": "7",
    "uuid": "af-7",
    "observed_on": "2021-03-09",
    "quality_grade": "research",
    "license": "CC-BY",
    "image_url": "https://host/photos/55/medium.jpg",
    "captive_cultivated": "false",
    "latitude": "36.1",
    "longitude": "-121.2",
    "positional_accuracy": "8",
    "coordinates_obscured": "false",
    "scientific_name": "Calochortus albus",
    "common_name": '"White ""globe"" lily, or fairy lantern"',
    "iconic_taxon_name": "Plantae",
    "taxon_id": "48971",
}


def write_inat(path: Path, *rows: dict[str, str], extra: tuple[str, ...] = ()) -> Path:
    columns = [*INAT_COLUMNS, *extra]
    lines = [",".join(columns)]
    for k, row in enumerate(rows):
        record = {**LILY, "id": str(7 + k), **row}
        lines.append(",".join(record.get(c, "") for c in columns))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def plain(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("name", ["gbif.csv", "gbif.zip", "strange.name"])
def test_gbif_simple_csv(tmp_path: Path, lower: bool, name: str) -> None:
    table = write_gbif(
        tmp_path / "0001.csv",
        {},
        {"taxonRank": "VARIETY", "infraspecificEpithet": "oxyadenia",
         "scientificName": "Quercus agrifolia var. oxyadenia (Torr.) J.T.Howell"},
        {"taxonRank": "GENUS", "species": "", "scientificName": "Quercus L."},
        {"eventDate": "2020-01-02/2020-01-05", "coordinateUncertaintyInMeters": ""},
        {"eventDate": "1850", "occurrenceStatus": "ABSENT"},
        lower=lower,
    )  # fmt: skip
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(table, "0001.csv")
    else:
        table.rename(path)
    got = read_observations(path)
    assert tuple(got.columns) == (*COLUMNS, "geometry")
    assert got["observation_id"].tolist() == ["1001", "1002", "1003", "1004", "1005"]
    assert got["taxon"].tolist() == [
        "Quercus agrifolia", "Quercus agrifolia", "Quercus", "Quercus agrifolia",
        "Quercus agrifolia",
    ]  # fmt: skip
    assert got["rank"].tolist() == ["species", "species", "genus", "species", "species"]
    higher = "Plantae/Tracheophyta/Magnoliopsida/Fagales/Fagaceae"
    assert (
        got["lineage"].tolist() == [f"{higher}/Quercus"] * 2 + [higher] + [f"{higher}/Quercus"] * 2
    )
    assert got["date"].dt.strftime("%Y-%m-%d").tolist() == [
        "2019-05-04", "2019-05-04", "2019-05-04", "2020-01-02", "1850-01-01",
    ]  # fmt: skip
    assert got["uncertainty_m"].isna().tolist() == [False, False, False, True, False]
    assert got["status"].tolist() == ["PRESENT"] * 4 + ["ABSENT"]
    assert set(got["source"]) == {OAK["datasetKey"]}
    assert (got.geometry.x == -122.25).all() and (got.geometry.y == 37.5).all()
    assert got.crs.to_epsg() == 4326


def test_inaturalist_export(tmp_path: Path) -> None:
    lineage = ("taxon_kingdom_name", "taxon_family_name", "taxon_genus_name", "taxon_species_name")
    names = dict(
        zip(lineage, ("Plantae", "Liliaceae", "Calochortus", "Calochortus albus"), strict=True)
    )
    got = read_observations(
        write_inat(
            tmp_path / "a.csv",
            names,
            {**names, "scientific_name": "Calochortus albus rubellus"},
            {**names, "geoprivacy": "obscured"},
            {**names, "taxon_geoprivacy": "obscured"},
            {**names, "taxon_geoprivacy": "open", "coordinates_obscured": "true"},
            {**names, "captive_cultivated": "true"},
            {"scientific_name": "Calochortus", "taxon_kingdom_name": "Plantae",
             "taxon_family_name": "Liliaceae", "taxon_genus_name": "Calochortus"},
            extra=lineage,
        )
    )  # fmt: skip
    assert got["taxon"].tolist() == ["Calochortus albus"] * 6 + ["Calochortus"]
    assert got["rank"].tolist() == ["species"] * 6 + [""]
    assert got["lineage"].tolist() == ["Plantae/Liliaceae/Calochortus"] * 6 + ["Plantae/Liliaceae"]
    assert got["obscured"].tolist() == [False, False, True, True, True, False, False]
    assert got["captive"].tolist() == [False] * 5 + [True, False]
    assert got["photo"][0] == "https://host/photos/55/medium.jpg"
    assert got["uncertainty_m"][0] == 8
    plainly = read_observations(
        write_inat(tmp_path / "b.csv", {"scientific_name": "Calochortus albus rubellus"})
    )
    assert plainly["taxon"].tolist() == ["Calochortus albus"]


def test_inaturalist_open_data_in_california() -> None:
    if not INAT_CALIFORNIA.exists():
        pytest.skip(f"{INAT_CALIFORNIA} is absent")
    got = read_observations(INAT_CALIFORNIA)
    raw = pd.read_csv(INAT_CALIFORNIA)
    assert got["observation_id"].tolist() == raw["observation_uuid"].tolist()
    below = ~raw["rank"].isin(["species", "hybrid"])
    assert 0 < below.sum() < len(raw)
    assert got["taxon"][~below].tolist() == raw["name"][~below].tolist()
    assert got["taxon"][below].tolist() == [" ".join(n.split()[:2]) for n in raw["name"][below]]
    assert got["photo"].tolist() == (raw["photo_id"].astype(str) + "." + raw["extension"]).tolist()
    np.testing.assert_array_equal(got["latitude"], raw["latitude"])
    assert set(got["lineage"]) == {""}, "numbers are no names"
    assert got["date"].notna().all()


def test_elapids_geopackage() -> None:
    elapid = pytest.importorskip("elapid")
    path = Path(elapid.__file__).parent / "data" / "ariolimax.gpkg"
    got = read_observations(path, taxon="Ariolimax columbianus")
    assert len(got) == 1595
    assert got.attrs["dropped"] == {"presence is not 1": 4990}
    raw = gpd.read_file(path).query("presence == 1").to_crs("EPSG:4326")
    np.testing.assert_allclose(got["longitude"], raw.geometry.x)
    assert set(got["taxon"]) == {"Ariolimax columbianus"}
    with pytest.raises(ObservationsError, match="--taxon"):
        read_observations(path)


META = """<?xml version="1.0" encoding="UTF-8"?>
<archive xmlns="http://rs.tdwg.org/dwc/text/" metadata="metadata.xml">
  <core encoding="UTF-8" fieldsTerminatedBy="\\t" linesTerminatedBy="\\n" fieldsEnclosedBy=""
        ignoreHeaderLines="1" rowType="http://rs.tdwg.org/dwc/terms/Occurrence">
    <files><location>occurrence.txt</location></files>
    <id index="0"/>
    <field index="1" term="http://rs.tdwg.org/dwc/terms/decimalLatitude"/>
    <field index="2" term="http://rs.tdwg.org/dwc/terms/decimalLongitude"/>
    <field index="3" term="http://rs.tdwg.org/dwc/terms/scientificName"/>
    <field index="4" term="http://rs.tdwg.org/dwc/terms/informationWithheld"/>
    <field index="5" default="PRESENT" term="http://rs.tdwg.org/dwc/terms/occurrenceStatus"/>
    <field default="CC0" term="http://purl.org/dc/terms/license"/>
  </core>
  <extension encoding="UTF-8" fieldsTerminatedBy="," linesTerminatedBy="\\n"
        fieldsEnclosedBy='"' ignoreHeaderLines="1" rowType="http://rs.gbif.org/terms/1.0/Multimedia">
    <files><location>multimedia.txt</location></files>
    <coreid index="0"/>
    <field index="1" term="http://purl.org/dc/terms/type"/>
    <field index="2" term="http://purl.org/dc/terms/identifier"/>
    <field index="3" term="http://purl.org/dc/terms/license"/>
  </extension>
</archive>
"""


@pytest.mark.parametrize("zipped", [True, False])
def test_darwin_core_archive_joins_photos_by_identifier(tmp_path: Path, zipped: bool) -> None:
    parts = {
        "meta.xml": META,
        "occurrence.txt": "gbifID\tlat\tlon\tname\tw\ts\n"
        "11\t37.1\t-122.1\tArbutus menziesii Pursh\t\t\n"
        "12\t37.2\t-122.2\tArbutus menziesii Pursh\tCoordinates are obscured\tabsent\n"
        "13\t37.3\t-122.3\tArbutus menziesii Pursh\t\t\n",
        "multimedia.txt": "gbifID,type,identifier,license\n"
        '13,StillImage,"https://host/a,b.jpg",CC0\n'
        "11,StillImage,https://host/1.jpg,CC-BY\n"
        "13,Sound,https://host/song.mp3,CC0\n"
        "13,StillImage,https://host/2.jpg,CC-BY-NC\n",
    }
    path = tmp_path / "archive"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in parts.items():
                archive.writestr(f"folder/{name}", text)
    else:
        path.mkdir()
        for name, text in parts.items():
            (path / name).write_text(text)
    got = read_observations(path)
    assert got["observation_id"].tolist() == ["11", "12", "13"]
    assert set(got["taxon"]) == {"Arbutus menziesii"}
    assert got["photo"].tolist() == [
        "https://host/1.jpg", "", "https://host/a,b.jpg | https://host/2.jpg",
    ]  # fmt: skip
    assert got["photo_license"].tolist() == ["CC-BY", "", "CC0 | CC-BY-NC"]
    assert got["license"].tolist() == ["CC0"] * 3, "a default of meta.xml"
    assert got["status"].tolist() == ["PRESENT", "ABSENT", "PRESENT"]
    assert got["obscured"].tolist() == [False, True, False]


def test_an_archive_that_declares_entities_or_lacks_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.xml").write_text("<!DOCTYPE a [<!ENTITY b 'c'>]>" + META)
    with pytest.raises(ObservationsError, match="entities"):
        read_observations(tmp_path)
    (tmp_path / "meta.xml").write_text(META)
    (tmp_path / "occurrence.txt").write_text("")
    with pytest.raises(ObservationsError, match=r"lacks its file 'multimedia.txt'"):
        read_observations(tmp_path)


def test_vector_files_of_any_crs(tmp_path: Path) -> None:
    points = gpd.GeoDataFrame(
        {"species": ["Acer negundo", "Acer rubrum"], "accuracy": [1, 2]},
        geometry=gpd.points_from_xy([-120.5, -120.25], [37.0, 37.25]),
        crs="EPSG:4326",
    )
    for name, crs in (("a.gpkg", "EPSG:32610"), ("b.geojson", "EPSG:4326"), ("c.fgb", "EPSG:3857")):
        points.to_crs(crs).to_file(tmp_path / name)
        got = read_observations(tmp_path / name).sort_values("longitude")
        np.testing.assert_allclose(got["longitude"], [-120.5, -120.25], atol=1e-9)
        assert got["taxon"].tolist() == ["Acer negundo", "Acer rubrum"]
    areas = points.to_crs("EPSG:3310").buffer(100)
    points.set_geometry(areas).to_file(tmp_path / "areas.gpkg")
    with pytest.raises(ObservationsError, match=r"areas\.gpkg row 1 is a Polygon"):
        read_observations(tmp_path / "areas.gpkg")


def test_photos_that_qgis_imported_are_records_with_a_date_and_a_file(tmp_path: Path) -> None:
    """The columns that QGIS 3's algorithm `Import geotagged photos` writes."""
    photos = gpd.GeoDataFrame(
        {
            "photo": ["/home/me/walk/IMG_1.jpg"],
            "filename": ["IMG_1"],
            "directory": ["/home/me/walk"],
            "altitude": [12.5],
            "direction": [np.nan],
            "rotation": [np.nan],
            "longitude": ["-120.5"],
            "latitude": ["37.0"],
            "timestamp": pd.to_datetime(["2024-05-03 10:00:00"]),
        },
        geometry=gpd.points_from_xy([-120.5], [37.0], [12.5]),
        crs="EPSG:4326",
    )
    photos.to_file(tmp_path / "photos.gpkg")
    [row] = read_observations(tmp_path / "photos.gpkg", taxon="Acer rubrum").itertuples()
    assert (row.longitude, row.latitude) == (-120.5, 37.0)
    assert row.date == pd.Timestamp("2024-05-03")
    assert row.photo == "/home/me/walk/IMG_1.jpg"


def test_names_that_a_shapefile_cuts_are_known_where_only_one_is_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = gpd.GeoDataFrame(
        {
            "scientific": ["Acer negundo L.", "Acer rubrum L."],
            "positional": [12.0, 30.0],
            "coordinate": [5.0, 6.0],
        },
        geometry=gpd.points_from_xy([-120.5, -120.25], [37.0, 37.25]),
        crs="EPSG:4326",
    )
    points.to_file(tmp_path / "a.shp")
    got = read_observations(tmp_path / "a.shp")
    assert got["taxon"].tolist() == ["Acer negundo", "Acer rubrum"]
    assert got["uncertainty_m"].tolist() == [12.0, 30.0]
    [told] = caplog.messages
    assert "coordinate may be coordinateuncertaintyinmeters or coordinatesobscured" in told
    points.to_file(tmp_path / "a.gpkg")
    with pytest.raises(ObservationsError, match="names no taxa among scientific"):
        read_observations(tmp_path / "a.gpkg")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_plain_tables_of_any_delimiter(tmp_path: Path, encoding: str, delimiter: str) -> None:
    text = "Species,Lat,Lon\nQuercus_agrifolia,37.5,-122.5\nAcer negundo,37.25,-122.25\n"
    (tmp_path / "a.txt").write_bytes(text.replace(",", delimiter).encode(encoding))
    got = read_observations(tmp_path / "a.txt")
    assert got["latitude"].tolist() == [37.5, 37.25]
    assert got["observation_id"].tolist() == ["a-1", "a-2"]
    assert got["source"].tolist() == ["a.txt", "a.txt"]


def test_decimal_commas_are_understood(tmp_path: Path) -> None:
    text = "species;latitude;longitude;uncertainty_m\nAcer negundo;37,5;-122,25;12,5\n"
    got = read_observations(plain(tmp_path / "a.csv", text))
    assert got[["latitude", "longitude", "uncertainty_m"]].iloc[0].tolist() == [37.5, -122.25, 12.5]


DEFECTS: dict[str, tuple[str, str]] = {
    "swapped": (
        "species,latitude,longitude\nA b,-122.5,37.5\nA b,-122.4,37.4\n",
        r"rows 1 \(-122.5\), 2 \(-122.4\): latitude is out of range.*look swapped",
    ),
    "swapped in a row": (
        "species,latitude,longitude\nA b,37.5,-122.5\nA b,-122.4,37.4\n",
        r"row 2 \(-122.4\): latitude is out of range.*look swapped in these rows: exchange them",
    ),
    "projected": (
        "species,latitude,longitude\nA b,37.5,-122.5\nA b,4150000,560000\n",
        r"row 2 \(4150000.0\): latitude is out of range, -90 to 90; give decimal degrees",
    ),
    "longitude": (
        "species,latitude,longitude\nA b,37.5,237.5\n",
        r"row 1 \(237.5\): longitude is out of range, -180 to 180",
    ),
    "word": (
        "species,latitude,longitude\nA b,37.5,-122.5\nA b,37° 30',-122.5\n",
        r"row 2 \(37° 30'\): latitude is no number",
    ),
    "thousands": (
        'species,latitude,longitude,uncertainty_m\nA b,37.5,-122.5,"1,000"\n',
        r"row 1 \(1,000\): uncertainty_m is no number",
    ),
    "no latitude": ("species,longitude,x\nA b,1,2\n", r"no column for latitude among species"),
    "x and y": (
        "species,x,y\nA b,560000,4150000\n",
        r"in decimal degrees, or give a vector file",
    ),
    "no taxon": ("latitude,longitude\n1,2\n", r"names no taxa .*--taxon"),
    "no rows": ("species,latitude,longitude\n", "has no rows"),
    "nothing usable": (
        "species,latitude,longitude\nA b,,\n,1,2\n",
        "holds no observation: 1 no position, 1 no name",
    ),
    "empty": ("\n", "is empty"),
    "too many fields": (
        "species,latitude,longitude\nA b,1,2\nA b,1,2,3\n",
        "line 3 has 4 fields, the header 3; quote",
    ),
    "decimal commas among commas": (
        "species,latitude,longitude\nA b,37,5,-122,5\nA b,37,25,-122,25\n",
        "line 2 and those below have more than the header's 3 fields; quote fields",
    ),
    "prose": ("These are my observations\n", "no line of column names"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named_with_file_row_and_value(tmp_path: Path, defect: str) -> None:
    text, message = DEFECTS[defect]
    with pytest.raises(ObservationsError, match=message) as caught:
        read_observations(plain(tmp_path / "mine.csv", text))
    assert "mine.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObservationsError, match="there is no file"):
        read_observations(tmp_path / "nowhere.csv")
    for start in (b"PK\x03\x04", b"PAR1", b"SQLite format 3\0", b"\0\1\2"):
        (tmp_path / "b").write_bytes(start + b"\0" * 200)
        with pytest.raises(ObservationsError, match=r"/b "):
            read_observations(tmp_path / "b")


def test_row_numbers_and_rows_do_not_depend_on_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"decimalLatitude": f"{30 + k / 10}"} for k in range(25)]
    path = write_gbif(tmp_path / "a.csv", *rows)
    whole = read_observations(path)
    monkeypatch.setattr(delimited, "CHUNK_ROWS", 4)
    pd.testing.assert_frame_equal(whole, read_observations(path))
    write_gbif(path, *rows, {"decimalLatitude": "95"})
    with pytest.raises(ObservationsError, match=r"row 26 \(95.0\)"):
        read_observations(path)


def test_an_unread_date_is_unknown_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "species,latitude,longitude,date\nA b,1,2,5/4/2018\nA b,1,2,2018-04-05\n"
    with caplog.at_level(logging.WARNING, "speciesmap"):
        got = read_observations(plain(tmp_path / "a.csv", text))
    assert got["date"].isna().tolist() == [True, False]
    assert "5/4/2018" in caplog.text


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Quercus agrifolia Née", "Quercus agrifolia"),
        ("Quercus agrifolia var. oxyadenia (Torr.) J.T.Howell", "Quercus agrifolia"),
        ("Passer domesticus (Linnaeus, 1758)", "Passer domesticus"),
        ("Quercus L.", "Quercus"),
        ("Quercus sp.", "Quercus"),
        ("Quercus cf. agrifolia", "Quercus"),
        ("Quercus \u00d7 morehus", "Quercus \u00d7 morehus"),
        ("Quercus_agrifolia", "Quercus agrifolia"),
        ("Arctostaphylos uva-ursi", "Arctostaphylos uva-ursi"),
        ("awt_sp01", "awt_sp01"),
        ("Species A", "Species A"),
        ("species 1", "species 1"),
        ("type B", "type B"),
        ("QUERCUS AGRIFOLIA", "Quercus agrifolia"),
        ("quercus Agrifolia", "Quercus agrifolia"),
        ("ARCTOSTAPHYLOS UVA-URSI", "Arctostaphylos uva-ursi"),
    ],
)
def test_authors_are_cut_off_names(written: str, name: str) -> None:
    assert scientific_name(written) == name


@pytest.mark.parametrize("header", ["scientific_name", "species", "taxon_species_name"])
def test_names_that_differ_in_case_are_one_taxon(tmp_path: Path, header: str) -> None:
    names = ["Quercus lobata", "QUERCUS LOBATA", "quercus lobata", "quercus Lobata"]
    rows = "".join(f"{name},38.5,{-121 - k / 100}\n" for k, name in enumerate(names))
    table = read_observations(plain(tmp_path / "t.csv", f"{header},latitude,longitude\n{rows}"))
    assert table["taxon"].unique().tolist() == ["Quercus lobata"]
    assert set(table["rank"]) == {"species"}


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_a_name_once_cut_stays_as_it_is(text: str) -> None:
    once = scientific_name(text)
    assert scientific_name(once) == once


EVERYTHING = Rules(
    present=False, wild=False, zero=False, centroids=False, captive=False, year_min=None,
    uncertainty_max_m=None, duplicates=False,
)  # fmt: skip


def test_rules_count_what_they_drop(tmp_path: Path) -> None:
    rows = [
        {},
        {"occurrenceStatus": "ABSENT"},
        {"basisOfRecord": "FOSSIL_SPECIMEN"},
        {"basisOfRecord": "LIVING_SPECIMEN", "occurrenceStatus": "ABSENT"},
        {"decimalLatitude": "0.0", "decimalLongitude": "0"},
        {"establishmentMeans": "Managed"},
        {"eventDate": "1899-12-31"},
        {"eventDate": ""},
        {"coordinateUncertaintyInMeters": "10001"},
        {"coordinateUncertaintyInMeters": "301"},
        {"coordinateUncertaintyInMeters": "", "decimalLatitude": "37.6"},
        {"decimalLatitude": ""},
    ]
    got = read_observations(write_gbif(tmp_path / "a.csv", *rows))
    assert got.attrs["dropped"] == {"no position": 1}
    kept, dropped = clean(got)
    assert dropped == {
        "present": 2, "wild": 1, "zero": 1, "centroids": 0, "captive": 1, "year_min": 1,
        "uncertainty_max_m": 2, "duplicates": 0,
    }  # fmt: skip
    assert kept["observation_id"].tolist() == ["1001", "1008", "1011"]
    assert clean(got, EVERYTHING)[1] == {}
    assert len(clean(got, EVERYTHING)[0]) == len(got)
    kept, dropped = clean(got, Rules(cell_m=100))
    assert dropped["cell_m"] == 1 and len(kept) == 2


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.floats(-60, 60), st.floats(-170, 170), st.sampled_from("ab"), st.floats(1, 99)
        ),
        min_size=1,
        max_size=30,
    ),
    cell_m=st.floats(1e3, 1e6),
)
def test_thinning_keeps_exactly_one_record_per_taxon_and_cell(
    rows: list[tuple[float, float, str, float]], cell_m: float
) -> None:
    latitude, longitude, taxon, uncertainty = zip(*rows, strict=True)
    table = gpd.GeoDataFrame(
        {
            "latitude": latitude,
            "longitude": longitude,
            "taxon": taxon,
            "uncertainty_m": uncertainty,
        },
        geometry=gpd.points_from_xy(longitude, latitude),
        crs="EPSG:4326",
    )  # fmt: skip
    only = replace(EVERYTHING, cell_m=cell_m)
    kept, dropped = clean(table, only)
    grid = kept.to_crs("EPSG:6933").geometry
    cells = list(zip(grid.x // cell_m, grid.y // cell_m, kept["taxon"], strict=True))
    assert len(cells) == len(set(cells))
    everywhere = table.to_crs("EPSG:6933").geometry
    all_cells = set(zip(everywhere.x // cell_m, everywhere.y // cell_m, taxon, strict=True))
    assert set(cells) == all_cells
    assert dropped["cell_m"] == len(rows) - len(kept)
    assert len(clean(kept, only)[0]) == len(kept)


def run(*words: Any) -> Any:
    return CliRunner().invoke(command, [str(w) for w in words], catch_exceptions=False)


def test_the_command_writes_a_table_that_reads_back_unchanged(tmp_path: Path) -> None:
    gbif = write_gbif(
        tmp_path / "gbif.csv", {}, {"occurrenceStatus": "ABSENT"}, {"decimalLatitude": ""}
    )
    inat = write_inat(
        tmp_path / "inat.csv", {}, {"captive_cultivated": "true"}, {"observed_on": ""}
    )
    out = tmp_path / "clean.parquet"
    result = run(gbif, inat, "--out", out, "--json", "-q")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["read"], report["kept"]) == (6, 3)
    assert report["dropped"]["no position"] == 1
    assert report["dropped"]["present"] == 1
    assert report["dropped"]["captive"] == 1
    assert report["taxa"] == {"Calochortus albus": 2, "Quercus agrifolia": 1}
    assert json.loads((tmp_path / "clean.report.json").read_text())["kept"] == 3

    written = read_observations(out)
    direct, _ = clean(read_observations([gbif, inat]))
    pd.testing.assert_frame_equal(
        pd.DataFrame(written).drop(columns="geometry"),
        pd.DataFrame(direct).drop(columns="geometry"),
    )
    assert gpd.read_parquet(out).crs.to_epsg() == 4326

    with pytest.raises(OutputError, match="--overwrite"):
        run(gbif, "--out", out)
    assert run(gbif, "--out", out, "--overwrite", "-q").exit_code == 0
    assert len(read_observations(out)) == 1


def test_nothing_left_or_a_wrong_name_leaves_no_output(tmp_path: Path) -> None:
    gbif = write_gbif(tmp_path / "gbif.csv", {"occurrenceStatus": "ABSENT"})
    with pytest.raises(ObservationsError, match="1 dropped by present"):
        clean_files([gbif], tmp_path / "clean.parquet")
    with pytest.raises(OutputError, match=r"call it .*clean\.parquet"):
        clean_files([gbif], tmp_path / "clean.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["gbif.csv"]


@pytest.mark.parametrize("written", ["points.gpkg", "points.fgb", "points.geojson", "p.parquet"])
@pytest.mark.parametrize("name", ["records.csv", "records.txt", "records"])
def test_vector_files_are_read_under_any_name(tmp_path: Path, written: str, name: str) -> None:
    points = gpd.points_from_xy([-122.5, -122.25], [37.0, 37.25], crs="EPSG:4326")
    table = gpd.GeoDataFrame({"species": ["Acer rubrum", "Acer negundo"]}, geometry=points)
    path = tmp_path / written
    (table.to_parquet if written.endswith("parquet") else table.to_file)(path)
    got = read_observations(path.rename(tmp_path / name)).sort_values("latitude")
    assert got["taxon"].tolist() == ["Acer rubrum", "Acer negundo"]
    assert got["latitude"].tolist() == pytest.approx([37.0, 37.25])


def oaks(**more: Any) -> pa.Table:
    return pa.table({"taxon": ["Quercus lobata"] * 2, "lon": [-122, -121], "lat": [37, 38], **more})


def with_geo(geo: dict[str, Any]) -> pa.Table:
    return oaks(geometry=[b"", b""]).replace_schema_metadata({"geo": json.dumps(geo)})


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        (with_geo({"columns": {}}), "primary_column"),
        (with_geo({"primary_column": "geometry", "columns": {}}), "geometry"),
        (with_geo({"primary_column": "shape", "columns": {"shape": {"encoding": "WKB"}}}), "shape"),
        (oaks(date=pa.array([0, 1], pa.timestamp("us", "Nowhere/Else"))), "Nowhere/Else"),
        (oaks(status=pa.array([b"PRESENT", b"\xffRESENT"]).view(pa.string())), "UTF8"),
    ],
    ids=["no geometry named", "none described", "none there", "time zone", "text"],
)
def test_a_damaged_parquet_file_is_refused_on_one_line(
    tmp_path: Path, damaged: pa.Table, says: str
) -> None:
    pq.write_table(damaged, tmp_path / "oaks.parquet")
    with pytest.raises(
        ObservationsError, match=rf"oaks\.parquet is a damaged Parquet file \(.*{says}.*\); copy"
    ) as error:
        read_observations(tmp_path / "oaks.parquet")
    assert "\n" not in str(error.value)


def test_a_column_that_comes_twice_is_the_first_of_them(tmp_path: Path) -> None:
    table = oaks(x=["Acer rubrum"] * 2).rename_columns(["taxon", "lon", "lat", "taxon"])
    pq.write_table(table, tmp_path / "oaks.parquet")
    assert set(read_observations(tmp_path / "oaks.parquet")["taxon"]) == {"Quercus lobata"}


def test_an_index_of_pandas_is_a_column_like_others(tmp_path: Path) -> None:
    table = oaks(gbifID=["7", "8"]).to_pandas().set_index("gbifID")
    table.to_parquet(tmp_path / "oaks.parquet")
    assert read_observations(tmp_path / "oaks.parquet")["observation_id"].tolist() == ["7", "8"]


@pytest.mark.filterwarnings("error")
def test_the_first_layer_of_shapes_is_read_whatever_lies_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "seen.gpkg"
    styles = pd.DataFrame({"f_table_name": ["oaks"], "styleQML": ["<qgis/>"]})
    pyogrio.write_dataframe(styles, path, layer="layer_styles")
    points = gpd.points_from_xy([-122.5], [37.0], crs="EPSG:4326")
    for layer, taxon in (("oaks", "Quercus lobata"), ("maples", "Acer rubrum")):
        gpd.GeoDataFrame({"species": [taxon]}, geometry=points).to_file(path, layer=layer)
        assert read_observations(path)["taxon"].tolist() == ["Quercus lobata"]
    assert caplog.messages == [f"{path} has the layers oaks, maples; oaks is read"]


def test_bytes_that_are_nothing_are_refused_by_their_own_name(tmp_path: Path) -> None:
    path = tmp_path / "noise.csv"
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ObservationsError, match=r"noise\.csv is no table and no vector file") as e:
        read_observations(path)
    assert "/tmp/tmp" not in str(e.value).replace(str(path), "")
