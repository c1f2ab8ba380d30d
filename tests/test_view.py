"""Maps in full resolution through a tile server on this machine."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from present_maps import chromium, ramp, write_map

from speciesmap.errors import ImageryError
from speciesmap.present.styles import STEPS, colour_table
from speciesmap.present.view import serving

pytest.importorskip("localtileserver", reason="localtileserver is not installed")


def test_a_raster_that_is_none_starts_no_server(tmp_path: Path) -> None:
    with pytest.raises(ImageryError, match=r"gone\.tif"), serving(tmp_path / "gone.tif"):
        pass


@pytest.mark.chromium
@pytest.mark.filterwarnings("error:invalid value encountered in cast:RuntimeWarning")
def test_full_resolution_tiles_lie_over_the_reduced_map(tmp_path: Path) -> None:
    values = ramp()
    raster = write_map(tmp_path / "a.tif", values)
    with serving(raster) as html, chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        complaints: list[str] = []
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        tiles: list[str] = []
        page.on("response", lambda r: tiles.append(r.url) if "/tiles/" in r.url and r.ok else None)
        page.goto(html.as_uri())
        page.wait_for_selector(".leaflet-sm-detail-pane img.leaflet-tile-loaded")
        page.wait_for_load_state("networkidle")
        assert tiles
        assert all(url.startswith("http://127.0.0.1:") for url in tiles)
        page.evaluate("speciesmap.layers[0].overlay.remove()")
        page.evaluate(
            "() => { const o = document.getElementById('sm-opacity'); o.value = 100;"
            " o.dispatchEvent(new Event('input')); }"
        )
        page.wait_for_timeout(600)
        size = page.viewport_size
        middle = page.evaluate(
            "() => { const m = speciesmap.map, p = m.latLngToContainerPoint("
            "L.latLngBounds(speciesmap.data.extent).getCenter()); return [p.x, p.y]; }"
        )
        shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
        seen = shot[round(middle[1]), round(middle[0])]
        assert size["width"] > middle[0] > 0
        near = [values[r, c] for r in (11, 12) for c in (14, 15)]
        wanted = [colour_table()[1 + round(v * STEPS), :3].astype(int) for v in near]
        assert min(np.abs(seen - w).max() for w in wanted) <= 6
        assert complaints == []
        served = tiles[0]
    assert not html.exists()
    with pytest.raises(OSError):
        urllib.request.urlopen(served, timeout=2)
