"""Small map GeoTIFFs and a browser without a network, for the tests of `present`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.transform import Affine, from_origin

from speciesmap.rasters.geotiff import MapWriter, write_geotiff

UTM = from_origin(560000, 4150000, 40, 40)
HOSTILE = "Alnus </script><script>window.hacked=1</script> <img src=x onerror='window.hacked=1'>"


def write_map(
    path: Path,
    values: Any,
    *,
    label: str = "Quercus agrifolia",
    query: str = "taxon",
    quantity: str = "suitability",
    crs: str = "EPSG:32610",
    transform: Affine = UTM,
    **more: str,
) -> Path:
    values = np.asarray(values, np.float32)
    tags = {"TAXON": label, "QUERY": query, "MODEL": "0123456789abcdef", **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    geobox = GeoBox(values.shape, transform, crs)
    with MapWriter(path, geobox, bands=[quantity], tags=tags) as writer:
        writer.write(0, 0, values[None])
    return path


def write_bands(
    path: Path, bands: dict[str, Any], transform: Affine = UTM, crs: str = "EPSG:32610", **tags: str
) -> Path:
    """A map of several named bands."""
    pixels = np.stack([np.asarray(values, np.float32) for values in bands.values()])
    grid = GeoBox(pixels.shape[1:], transform, crs)
    write_geotiff(path, pixels, grid, bands=list(bands), nodata=np.nan)
    with rasterio.open(path, "r+") as raster:
        raster.update_tags(**{"TAXON": "Quercus agrifolia", "QUERY": "taxon", **tags})
    return path


def ramp(height: int = 24, width: int = 30) -> np.ndarray:
    """Values that differ from cell to cell, with a hole in the north-west."""
    values = np.linspace(0.02, 0.98, height * width, dtype=np.float32).reshape(height, width)
    values[:4, :6] = np.nan
    return values


class Visit:
    """One open page, and all it asked for and complained about."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )

    @property
    def outside(self) -> list[str]:
        inside = ("file:", "data:", "blob:")
        return [url for url in self.requests if not url.startswith(inside)]


@contextmanager
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Debian's chromium is not installed")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--force-color-profile=srgb",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Any, html: Path, width: int = 1200, height: int = 760, **options: Any) -> Any:
    """Open a page with the network cut."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        offline=True,
        reduced_motion="reduce",
        **options,
    )
    try:
        seen = Visit(context.new_page())
        seen.page.set_default_timeout(8000)
        seen.page.goto(html.as_uri())
        yield seen
    finally:
        context.close()


CONTRAST = """() => {
  const parse = (c) => {
    const n = c.match(/[\\d.]+/g).map(Number);
    const k = c.startsWith("color(") ? 255 : 1;
    return [n[0] * k, n[1] * k, n[2] * k, n.length > 3 ? n[3] : 1];
  };
  const light = ([r, g, b]) => {
    const line = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * line(r / 255) + 0.7152 * line(g / 255) + 0.0722 * line(b / 255);
  };
  const found = [];
  const measure = (element, colour, text) => {
    let ground = null;
    for (let e = element; e && !ground; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.85) ground = c;
    }
    if (!ground) return;
    const [a, b] = [light(parse(colour)), light(ground)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text.slice(0, 40)]);
  };
  for (const field of document.querySelectorAll("[placeholder]"))
    measure(field, getComputedStyle(field, "::placeholder").color, field.placeholder);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const box = element.getBoundingClientRect();
    if (!text || !box.width || !box.height) continue;
    if (element.closest("script, style, noscript, select")) continue;
    const style = getComputedStyle(element);
    if (style.visibility === "hidden") continue;
    measure(element, style.color, text);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""
"""Contrast of every visible text against the nearest opaque ground, lowest first (WCAG 2.1)."""
