"""What maps look like: the palette, values as pictures, and the style that QGIS reads."""

from __future__ import annotations

import html
import io
import json
import os
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from PIL import Image
from present_maps import HOSTILE, ramp, write_map
from shapely.geometry import MultiPolygon, box

from speciesmap.errors import ImageryError, OutputError
from speciesmap.mapping.ranges import write_ranges
from speciesmap.present.qgis import write_project
from speciesmap.present.styles import (
    PALETTE,
    STEPS,
    colour_table,
    encode_png,
    quantise,
    read_legend,
    style_ranges,
    write_qml,
)
from speciesmap.rasters.geotiff import MapWriter
from speciesmap.rasters.imagery import open_raster

SYSTEM_PYTHON = "/usr/bin/python3"


def linear(rgb: np.ndarray) -> np.ndarray:
    share = rgb / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours."""
    y = linear(rgb) @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_a_few_months_are_what_their_tag_says(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    grid = GeoBox((4, 4), Affine(1, 0, 550_000, 0, -1, 4_180_000), "EPSG:32610")
    values = np.linspace(0.2, 0.4, 32, dtype=np.float32).reshape(2, 4, 4)
    with MapWriter(path, grid, bands=["May", "June"], tags={"QUANTITY": "suitability"}) as writer:
        writer.write(0, 0, values)
    with open_raster(path) as dataset:
        legend = read_legend(dataset)
    assert (legend.quantity, legend.low, legend.high) == ("suitability", 0, 1)


def test_palette_grows_lighter_evenly_so_that_it_reads_in_grey() -> None:
    steps = np.diff(lightness(colour_table()[1:, :3].astype(float))[:: STEPS // 10])
    assert (steps > 0).all()
    assert steps.max() < 2 * steps.min()


@pytest.mark.parametrize(
    "matrix",
    [
        # Machado, Oliveira & Fernandes 2009, severity 1: protanopia, deuteranopia, tritanopia.
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]],
    ],
    ids=["protanopia", "deuteranopia", "tritanopia"],
)  # fmt: skip
def test_palette_keeps_its_order_for_the_colour_blind(matrix: list[list[float]]) -> None:
    colours = colour_table()[1:, :3].astype(float)[:: STEPS // 10]
    seen = np.clip(linear(colours) @ np.array(matrix).T, 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055) * 255
    assert (np.diff(lightness(encoded)) > 3).all()


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_quantised_values_come_back_within_half_a_step(
    values: list[float], low: float, span: float
) -> None:
    high = low + span
    steps = quantise(values, low, high).astype(float)
    array = np.array(values)
    there = np.isfinite(array)
    assert (steps[~there] == 0).all()
    back = low + (steps[there] - 1) / STEPS * (high - low)
    wanted = np.clip(array[there], low, high)
    assert np.allclose(back, wanted, rtol=0, atol=span * 0.501 / STEPS + 1e-9 * abs(low))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_png_holds_the_values_themselves(height: int, width: int, seed: int) -> None:
    steps = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    image = Image.open(io.BytesIO(encode_png(steps)))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), steps)
    assert np.array_equal(
        np.asarray(image.convert("RGBA"))[steps > 0], colour_table()[steps[steps > 0]]
    )
    assert (np.asarray(image.convert("RGBA"))[steps == 0, 3] == 0).all()


def test_suitability_spans_zero_to_one_whatever_the_map_holds(tmp_path: Path) -> None:
    path = write_map(tmp_path / "low.tif", np.full((8, 8), 0.1))
    with open_raster(path) as dataset:
        legend = read_legend(dataset)
    assert (legend.low, legend.high, legend.quantity) == (0, 1, "suitability")
    assert (legend.label, legend.query, legend.model) == (
        "Quercus agrifolia",
        "taxon",
        "0123456789abcdef",
    )


@pytest.mark.parametrize("constant", [True, False])
def test_other_quantities_span_their_own_range(tmp_path: Path, constant: bool) -> None:
    values = np.full((8, 8), 3.0) if constant else np.linspace(-2, 5, 64).reshape(8, 8)
    path = write_map(tmp_path / "a_place.tif", values, quantity="richness", label="")
    with open_raster(path) as dataset:
        legend = read_legend(dataset)
    assert legend.label == "a place"
    assert (legend.low, legend.high) == ((3, 4) if constant else (-2, 5))


def test_style_has_labelled_breaks_over_the_fixed_range(tmp_path: Path) -> None:
    path = write_map(tmp_path / "oak.tif", ramp() / 2, quantity="probability")
    style = write_qml(path)
    assert style == tmp_path / "oak.qml"
    root = ET.parse(style).getroot()
    renderer = root.find("pipe/rasterrenderer")
    assert renderer is not None
    assert renderer.get("type") == "singlebandpseudocolor"
    assert (renderer.get("classificationMin"), renderer.get("classificationMax")) == ("0.0", "1.0")
    items = root.findall(".//colorrampshader/item")
    assert [i.get("color") for i in items] == list(PALETTE)
    assert [i.get("label") for i in items] == [
        "0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1",
    ]  # fmt: skip
    titles = [o.get("value") for o in root.iter("Option") if o.get("name") == "legend/title-label"]
    assert titles == ["Quercus agrifolia (probability)"]


@pytest.mark.parametrize("label", [HOSTILE, 'a"b&c', "bell \x07 and \x1b!", "Ærø çöş 猫"])
def test_style_of_any_name_is_well_formed(tmp_path: Path, label: str) -> None:
    style = write_qml(write_map(tmp_path / "m.tif", ramp(), label=label))
    titles = [
        o.get("value")
        for o in ET.parse(style).getroot().iter("Option")
        if o.get("name") == "legend/title-label"
    ]
    printable = "".join(c for c in label if ord(c) >= 32)
    assert titles == [f"{printable} (suitability)"]


def test_style_of_nothing_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ImageryError, match=r"gone\.tif"):
        write_qml(tmp_path / "gone.tif")
    assert list(tmp_path.iterdir()) == []


QGIS = """
import json, sys
from qgis.core import *
from qgis.PyQt.QtCore import QSize
from qgis.PyQt.QtGui import QColor
QgsApplication.setPrefixPath("/usr", True)
app = QgsApplication([], False)
app.initQgis()
layer = QgsRasterLayer(sys.argv[1], "map")
settings = QgsMapSettings()
settings.setLayers([layer])
settings.setDestinationCrs(layer.crs())
settings.setExtent(layer.extent())
settings.setOutputSize(QSize(int(sys.argv[2]), int(sys.argv[3])))
settings.setBackgroundColor(QColor(0, 0, 0, 0))
job = QgsMapRendererSequentialJob(settings)
job.start()
job.waitForFinished()
image = job.renderedImage()
colours = [[image.pixelColor(x, y).getRgb() for x in range(5, image.width(), 10)]
           for y in range(5, image.height(), 10)]
box = layer.extent()
nodes = [item[0] for item in layer.renderer().legendSymbologyItems()]
print("JSON" + json.dumps({
    "valid": layer.isValid(), "renderer": layer.renderer().type(), "band": layer.bandName(1),
    "crs": layer.crs().authid(), "title": layer.customProperty("legend/title-label"),
    "extent": [box.xMinimum(), box.yMinimum(), box.xMaximum(), box.yMaximum()],
    "notes": QgsLayerNotesUtils.layerNotes(layer), "labels": nodes, "colours": colours}))
"""


def run_qgis(tmp_path: Path, script: str, *arguments: str) -> Any:
    """Run a script under the system's QGIS and read the JSON that it prints."""
    if (
        not Path(SYSTEM_PYTHON).exists()
        or subprocess.run(
            [SYSTEM_PYTHON, "-c", "import qgis.core"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("Debian's python3-qgis is not installed")
    run = subprocess.run(
        [SYSTEM_PYTHON, "-c", script, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "QT_QPA_PLATFORM": "offscreen",
             "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )  # fmt: skip
    assert "JSON" in run.stdout, run.stderr
    return json.loads(run.stdout.split("JSON", 1)[1])


@pytest.mark.qgis
def test_qgis_opens_a_map_styled_and_in_place(tmp_path: Path) -> None:
    values = ramp()
    path = write_map(tmp_path / "oak.tif", values, CAUTION=f"few presences {HOSTILE}")
    write_qml(path)
    height, width = values.shape
    seen = run_qgis(tmp_path, QGIS, str(path), str(width * 10), str(height * 10))
    assert seen["valid"]
    assert seen["renderer"] == "singlebandpseudocolor"
    assert seen["band"] == "Band 1: suitability"
    assert seen["crs"] == "EPSG:32610"
    assert seen["extent"] == [560000, 4150000 - 40 * height, 560000 + 40 * width, 4150000]
    assert seen["title"] == "Quercus agrifolia (suitability)"
    assert html.unescape(seen["notes"]) == f"few presences {HOSTILE}"
    assert "<" not in seen["notes"]
    assert seen["labels"][0] == "0"
    assert seen["labels"][-1] == "1"
    colours = np.array(seen["colours"])
    hole = np.isnan(values)
    assert (colours[hole][:, 3] == 0).all()
    assert np.abs(colours[~hole][:, :3] - in_palette(values[~hole])).max() <= 2


def in_palette(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1, shape (value, 3)."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE])
    breaks = np.linspace(0, 1, len(PALETTE))
    return np.stack([np.interp(values, breaks, anchors[:, k]) for k in range(3)], axis=1)


PROJECT = """
import json, sys
from qgis.core import *
from qgis.PyQt.QtCore import QSize
from qgis.PyQt.QtGui import QColor
QgsApplication.setPrefixPath("/usr", True)
app = QgsApplication([], False)
app.initQgis()
project = QgsProject.instance()
read = project.read(sys.argv[1])
tree = project.layerTreeRoot()
groups = {g.name(): [l.name() for l in g.findLayers()] for g in tree.children()}
shown = [l.name() for l in tree.findLayers() if l.isVisible()]
legends = [len(QgsLayerTreeModel(tree).layerLegendNodes(l)) for l in tree.findLayers()]
settings = QgsMapSettings()
settings.setLayers([l.layer() for l in tree.findLayers() if l.isVisible()])
settings.setDestinationCrs(project.crs())
settings.setOutputSize(QSize(300, 240))
settings.setExtent(settings.fullExtent())
settings.setBackgroundColor(QColor("white"))
job = QgsMapRendererSequentialJob(settings)
job.start()
job.waitForFinished()
picture = job.renderedImage()
colours = [[picture.pixelColor(10 * c + 5, 10 * r + 5).getRgb()[:3] for c in range(30)]
           for r in range(24)]
layers = [[l.name(), l.isValid(), l.renderer().type(), l.crs().authid(),
           l.renderer().classificationMax()] for l in project.mapLayers().values()]
print("JSON" + json.dumps({"read": read, "groups": groups, "shown": shown, "layers": layers,
                           "title": project.title(), "crs": project.crs().authid(),
                           "legends": legends, "colours": colours}))
"""


@pytest.mark.qgis
@pytest.mark.parametrize("suffix", [".qgz", ".qgs"])
def test_qgis_project_groups_all_maps_and_may_be_moved(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "maps & <more>"
    maps = [
        write_map(folder / "a.tif", ramp()),
        write_map(folder / "b.tif", ramp(), label=HOSTILE),
        write_map(folder / "c.tif", ramp() * 40, query="photo", label="oak", quantity="count"),
    ]
    write_project(folder / f"maps{suffix}", maps, title=HOSTILE)
    moved = folder.rename(tmp_path / "moved")
    seen = run_qgis(tmp_path, PROJECT, str(moved / f"maps{suffix}"))
    assert seen["read"]
    assert seen["title"] == HOSTILE
    assert seen["crs"] == "EPSG:32610"
    assert seen["groups"] == {
        "Species": ["Quercus agrifolia", HOSTILE],
        "Asked for by photos": ["oak"],
    }
    assert seen["shown"] == ["Quercus agrifolia"]
    assert len(seen["layers"]) == 3
    assert min(seen["legends"]) >= len(PALETTE)
    hole, colours = np.isnan(ramp()), np.array(seen["colours"])
    assert (colours[hole] == 255).all()
    assert np.abs(colours[~hole] - in_palette(ramp()[~hole])).max() <= 2
    for name, valid, renderer, crs, high in seen["layers"]:
        assert (valid, renderer, crs) == (True, "singlebandpseudocolor", "EPSG:32610")
        assert high == (1 if name != "oak" else pytest.approx(39.2, abs=0.1))


ROUGH = "O'Brien's \"oak\" \\ 5% & <b>"


def write_squares(path: Path, taxa: tuple[str, ...] = (ROUGH, "Quercus lobata")) -> Path:
    """Ranges of taxa on the place of `ramp`: a half within the whole, east or west of it."""
    whole = box(560_000, 4_149_040, 561_200, 4_150_000)
    rows = []
    for k, taxon in enumerate(taxa):
        half = box(560_600 - 600 * k, 4_149_040, 561_200 - 600 * k, 4_150_000)
        rows += [
            (taxon, rule, MultiPolygon([part])) for rule, part in (("5th", whole), ("10th", half))
        ]
    table = gpd.GeoDataFrame(rows, columns=["taxon", "rule", "geometry"], crs="EPSG:32610")
    style_ranges(write_ranges(table, path))
    return path


RANGES = """
import json, sys
from qgis.core import *
from qgis.PyQt.QtCore import QSize
from qgis.PyQt.QtGui import QColor
QgsApplication.setPrefixPath("/usr", True)
app = QgsApplication([], False)
app.initQgis()
if sys.argv[1].endswith(".gpkg"):
    layer, names, crs = QgsVectorLayer(sys.argv[1], "any name", "ogr"), [], None
else:
    project = QgsProject.instance()
    project.read(sys.argv[1])
    tree = project.layerTreeRoot()
    names = [[l.name(), l.isVisible()] for l in tree.findLayers()]
    layer, crs = tree.findLayers()[0].layer(), project.crs().authid()
settings = QgsMapSettings()
settings.setLayers([layer])
settings.setDestinationCrs(layer.crs())
settings.setExtent(layer.extent())
settings.setOutputSize(QSize(300, 240))
settings.setBackgroundColor(QColor("white"))
job = QgsMapRendererSequentialJob(settings)
job.start()
job.waitForFinished()
picture = job.renderedImage()
taxa = [[t.label(), t.active(), [
    [r.label(), r.symbol().color().name(), len(list(layer.getFeatures(
        f"({t.filterExpression()}) AND ({r.filterExpression()})")))] for r in t.children()]]
    for t in layer.renderer().rootRule().children()]
print("JSON" + json.dumps({"valid": layer.isValid(), "crs": layer.crs().authid(), "taxa": taxa,
    "west": picture.pixelColor(75, 120).getRgb()[:3], "names": names,
    "east": picture.pixelColor(225, 120).getRgb()[:3]}))
"""


@pytest.mark.qgis
@pytest.mark.parametrize("opened", ["ranges.gpkg", "maps.qgz"])
def test_qgis_opens_ranges_in_the_palette_and_draws_those_of_the_first_taxon(
    tmp_path: Path, opened: str
) -> None:
    ranges = write_squares(tmp_path / "a & b" / "ranges.gpkg")
    path = write_map(ranges.with_name("oak.tif"), ramp())
    write_project(ranges.with_name("maps.qgz"), [path], ranges=ranges)
    moved = ranges.parent.rename(tmp_path / "moved")
    seen = run_qgis(tmp_path, RANGES, str(moved / opened))
    assert (seen["valid"], seen["crs"]) == (True, "EPSG:32610")
    rules = [["5th", PALETTE[3], 1], ["10th", PALETTE[6], 1]]
    assert seen["taxa"] == [[ROUGH, True, rules], ["Quercus lobata", False, rules]]
    if opened == "maps.qgz":
        assert seen["names"] == [["Ranges", False], ["Quercus agrifolia", True]]
    white, colours = (
        np.full(3, 255),
        [np.array(list(bytes.fromhex(PALETTE[k][1:]))) for k in (3, 6)],
    )
    whole = white + (colours[0] - white) * 90 / 255
    assert seen["west"] == pytest.approx(whole, abs=2)
    assert seen["east"] == pytest.approx(whole + (colours[1] - whole) * 90 / 255, abs=2)


def test_a_style_leaves_the_ranges_as_they_were(tmp_path: Path) -> None:
    path = write_squares(tmp_path / "ranges.gpkg")
    assert [file.name for file in tmp_path.iterdir()] == ["ranges.gpkg"]
    assert gpd.list_layers(path)["name"].tolist() == ["ranges", "layer_styles"]
    assert gpd.read_file(path, layer="ranges")["rule"].tolist() == ["5th", "10th"] * 2


def test_qgis_project_of_nothing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no maps"):
        write_project(tmp_path / "p.qgz", [])
    with pytest.raises(OutputError, match=r"\.qgz"):
        write_project(tmp_path / "p.zip", [write_map(tmp_path / "a.tif", ramp())])
    (tmp_path / "p.qgz").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        write_project(tmp_path / "p.qgz", [tmp_path / "a.tif"])
    assert (tmp_path / "p.qgz").read_text() == "mine"
