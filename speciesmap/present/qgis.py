"""A QGIS project that opens a folder's maps together, styled and grouped."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from speciesmap.errors import OutputError
from speciesmap.outputs import replacing
from speciesmap.present.styles import (
    DOCTYPE,
    range_elements,
    read_legend,
    style_elements,
    xml_text,
)
from speciesmap.present.warp import open_map

GROUPS = {
    "taxon": "Species",
    "photo": "Asked for by photos",
    "text": "Asked for in words",
    "richness": "Richness",
}

ID_PREFIX = "speciesmap_layer_"
"""QGIS replaces a layer's identity of ten letters or fewer, and then its list lacks the layer."""


def write_project(
    out: Path,
    tifs: Sequence[Path],
    *,
    ranges: Path | None = None,
    title: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a QGIS project of maps, grouped by how they were asked for.

    Paths are relative, so that the folder may be moved; the first map is shown, the others wait in
    the list. The canvas has the first map's CRS.

    Args:
        out: A `.qgz` file, or a `.qgs` one, which is the same unzipped.
        tifs: Map GeoTIFFs.
        ranges: GeoPackage of their ranges, in the first map's CRS.
        title: Of the project; by default the file's stem.
        overwrite: Whether `out` may be replaced.

    Returns:
        `out`.

    Raises:
        ImageryError: A map cannot be opened or has no place on Earth.
        OutputError: There are no maps, the name has another suffix, or `out` exists.
    """
    out = Path(out)
    if not tifs:
        raise OutputError(f"no maps for {out}; name at least one GeoTIFF")
    if out.suffix.lower() not in (".qgz", ".qgs"):
        raise OutputError(f"{out} is no QGIS project; name it with the suffix .qgz or .qgs")
    root = ET.Element("qgis", version="3.22", projectname=xml_text(title or out.stem))
    ET.SubElement(root, "title").text = xml_text(title or out.stem)
    project_crs = ET.SubElement(root, "projectCrs")
    tree = ET.SubElement(root, "layer-tree-group")
    groups: dict[str, ET.Element] = {}
    canvas = ET.SubElement(root, "mapcanvas", name="theMapCanvas", annotationsVisible="1")
    layers = ET.SubElement(root, "projectlayers")

    def beside(path: Path) -> str:
        return "./" + Path(os.path.relpath(path, out.parent)).as_posix()

    for i, tif in enumerate(tifs):
        with open_map(tif) as dataset:
            legend, bounds, crs = read_legend(dataset), dataset.bounds, dataset.crs
        if i == 0 and ranges is not None:  # above the maps
            source = f"{beside(ranges)}|layername=ranges"
            layer = _layer(layers, tree, "Ranges", "vector", source, crs, shown=False)
            layer.extend(range_elements(ranges))
        group = GROUPS.get(legend.query, "Maps")
        if group not in groups:
            groups[group] = ET.SubElement(
                tree, "layer-tree-group", name=group, checked="Qt::Checked", expanded="1"
            )
        layer = _layer(
            layers, groups[group], legend.label, "raster", beside(tif), crs, shown=i == 0
        )
        layer.extend(style_elements(legend))
        if i == 0:
            _crs(project_crs, crs)
            extent = ET.SubElement(canvas, "extent")
            for name, value in zip(("xmin", "ymin", "xmax", "ymax"), bounds, strict=True):
                ET.SubElement(extent, name).text = repr(value)
            _crs(ET.SubElement(canvas, "destinationsrs"), crs)
    properties = ET.SubElement(root, "properties")
    enabled = ET.SubElement(properties, "SpatialRefSys")
    ET.SubElement(enabled, "ProjectionsEnabled", type="int").text = "1"
    ET.SubElement(ET.SubElement(properties, "Paths"), "Absolute", type="bool").text = "false"
    ET.indent(root)
    text = DOCTYPE + ET.tostring(root, encoding="unicode")
    with replacing(out, overwrite=overwrite) as file:
        if out.suffix.lower() == ".qgz":
            with zipfile.ZipFile(file, "w") as archive:
                inside = zipfile.ZipInfo(f"{out.stem}.qgs")  # without a time: same maps, same bytes
                inside.compress_type = zipfile.ZIP_DEFLATED
                inside.external_attr = 0o644 << 16
                archive.writestr(inside, text)
        else:
            file.write_text(text, encoding="utf-8")
    return out


def _layer(
    layers: ET.Element,
    group: ET.Element,
    label: str,
    kind: Literal["raster", "vector"],
    source: str,
    crs: Any,
    *,
    shown: bool,
) -> ET.Element:
    """Add one map or the ranges to the layers and to its group in the list, without a style."""
    identity = f"{ID_PREFIX}{len(layers)}"
    name, provider = xml_text(label), "gdal" if kind == "raster" else "ogr"
    ET.SubElement(
        group,
        "layer-tree-layer",
        id=identity,
        name=name,
        source=xml_text(source),
        providerKey=provider,
        checked="Qt::Checked" if shown else "Qt::Unchecked",
        expanded="1" if shown else "0",
    )
    layer = ET.SubElement(layers, "maplayer", type=kind, hasScaleBasedVisibilityFlag="0")
    ET.SubElement(layer, "id").text = identity
    ET.SubElement(layer, "datasource").text = xml_text(source)
    ET.SubElement(layer, "layername").text = name
    ET.SubElement(layer, "provider").text = provider
    _crs(ET.SubElement(layer, "srs"), crs)
    return layer


def _crs(parent: ET.Element, crs: Any) -> None:
    system = ET.SubElement(parent, "spatialrefsys", nativeFormat="Wkt")
    ET.SubElement(system, "wkt").text = crs.to_wkt()
    if crs.to_epsg():
        ET.SubElement(system, "authid").text = f"EPSG:{crs.to_epsg()}"
