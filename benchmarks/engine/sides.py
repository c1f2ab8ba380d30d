"""One contestant in one process: `sides.py NAME SCENE MODEL`, prints one JSON object.

All take the windows of one GeoTIFF through one encoder and score them against one direction; the
scores are given back sorted, because the grids are walked in different orders. The time runs from
the first pixel read to the last output written; imports, the loading of weights and one batch to
warm up are left out. The encoder alone, on windows in memory, is measured in the same process just
before and just after.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file

HERE = Path(__file__).parent
runpy.run_path(str(HERE.parents[1] / "speciesmap" / "models" / "torchvision_guard.py"))

import timm  # noqa: E402  (imports torchvision)

WINDOW, STRIDE, CELL = 256, 128, 64
BATCH = 8  # of 4, 8, 16 and 32 the quickest for ViT-S/16 on two cores, with 16; for all alike
ENCODER_S = 5.0
COMPARED = 64  # windows of a run that are encoded again by themselves


class PlainEncoder(torch.nn.Module):
    """The aerial tower of a plain model, from its weights alone; raw pixels to scores (N,)."""

    def __init__(self, folder: Path, query: torch.Tensor) -> None:
        super().__init__()
        weights = {
            name.removeprefix("aerial."): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name.startswith("aerial.")
        }
        facts = json.loads((folder / "config.json").read_text())["architecture"]
        self.backbone = timm.create_model(
            facts["aerial"]["backbone"], img_size=WINDOW, num_classes=0, in_chans=3
        )
        self.project = torch.nn.Linear(self.backbone.num_features, facts["dim"])
        self.register_buffer("mean", weights["mean"])
        self.register_buffer("std", weights["std"])
        self.load_state_dict(weights)
        self.query = query
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores of windows, (N,), which are kept in `seen`."""
        features = self.project(self.backbone((pixels.float() - self.mean) / self.std))
        scores = F.normalize(features, dim=1) @ self.query
        self.seen.append(scores)
        return scores

    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores spread over their windows, (N, 1, H, W), for tools that stitch images."""
        return self(pixels)[:, None, None, None].expand(-1, 1, *pixels.shape[-2:]).contiguous()


def torchgeo(encoder: PlainEncoder, scene: Path) -> None:
    """Sample windows of a data set on a grid."""
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler

    class Scene(RasterDataset):
        filename_glob = scene.name
        is_image = True

    data = Scene(scene.parent)
    sampler = GridGeoSampler(data, size=WINDOW, stride=STRIDE)
    for batch in DataLoader(data, batch_size=BATCH, sampler=sampler, collate_fn=stack_samples):
        encoder(batch["image"])


def terratorch(encoder: PlainEncoder, scene: Path) -> None:
    """Infer in tiles from a raster in memory."""
    from terratorch.tasks.tiled_inference import tiled_inference

    with rasterio.open(scene) as raster:
        pixels = torch.from_numpy(raster.read()).float()[None]
    tiled_inference(
        encoder.maps,
        pixels,
        out_channels=1,
        crop=WINDOW,
        stride=STRIDE,
        delta=0,
        padding=False,
        blend_overlaps=False,
        batch_size=BATCH,
        device="cpu",
    )


def geoai(encoder: PlainEncoder, scene: Path) -> None:
    """Predict a GeoTIFF from a GeoTIFF."""
    from geoai.inference import predict_geotiff

    class Maps(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return encoder.maps(pixels)

    with tempfile.TemporaryDirectory() as folder:
        predict_geotiff(
            Maps(),
            str(scene),
            f"{folder}/out.tif",
            tile_size=WINDOW,
            overlap=WINDOW - STRIDE,
            batch_size=BATCH,
            blend_mode="none",
            preprocess_fn=lambda tile: tile.astype(np.float32),
            device="cpu",
            verbose=False,
        )


def xbatcher(encoder: PlainEncoder, scene: Path) -> None:
    """Batch windows of an xarray."""
    import rioxarray
    import xbatcher

    opened = rioxarray.open_rasterio(scene, chunks=None)
    overlap = {"y": WINDOW - STRIDE, "x": WINDOW - STRIDE}
    size = {"band": 3, "y": WINDOW, "x": WINDOW}
    waiting = []
    for window in xbatcher.BatchGenerator(opened, input_dims=size, input_overlap=overlap):
        waiting.append(torch.from_numpy(np.ascontiguousarray(window.values)))
        if len(waiting) == BATCH:
            encoder(torch.stack(waiting))
            waiting = []
    if waiting:
        encoder(torch.stack(waiting))


PEERS: dict[str, Callable[[PlainEncoder, Path], None]] = {
    "torchgeo": torchgeo,
    "terratorch": terratorch,
    "geoai": geoai,
    "xbatcher": xbatcher,
}


def peer(name: str, scene: Path, folder: Path, query: torch.Tensor) -> dict[str, object]:
    """Run a peer over a scene, and its encoder alone before and after."""
    encoder = PlainEncoder(folder, query).eval()
    windows = some_windows(scene)
    with torch.inference_mode():
        before = encoder_alone(lambda: encoder(windows), len(windows))
        encoder.seen.clear()
        start = clocks()
        PEERS[name](encoder, scene)
        spent = clocks() - start
        scores = torch.cat(encoder.seen)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        after = encoder_alone(lambda: encoder(windows), len(windows))
    return {
        "version": version({"geoai": "geoai-py"}.get(name, name)),
        **measures(len(scores), spent, (before + after) / 2),
        "memory_mb": memory,
        "scores": scores.sort().values.tolist(),
    }


def ours(name: str, scene: Path, folder: Path, query: torch.Tensor) -> dict[str, object]:
    """Run the engine over a scene, its encoder alone beside, and compare some windows."""
    import speciesmap
    from speciesmap.mapping import tiles as engine
    from speciesmap.rasters.imagery import open_imagery
    from speciesmap.rasters.windows import WindowGrid

    model = speciesmap.load_model(folder)
    precision = "bfloat16" if "bfloat16" in name else "float32"
    windows = some_windows(scene)
    made: list[tuple[tuple[int, int], NDArray[np.int64], torch.Tensor]] = []
    write = engine._write

    def watched(store, tile, layout, vectors, spent):  # type: ignore[no-untyped-def]
        if vectors is not None:
            made.append((tile, layout.slots, vectors))
        write(store, tile, layout, vectors, spent)

    def alone(pixels: torch.Tensor = windows) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return model.encode_aerial(pixels).float()

    with (
        torch.inference_mode(),
        torch.autocast("cpu", enabled=False),  # outermost: the encoder alone keeps its casts too
        tempfile.TemporaryDirectory() as out,
    ):
        before = encoder_alone(alone, len(windows))
        engine._write = watched
        start = clocks()
        store = speciesmap.embed(
            model,
            scene,
            f"{out}/s.zarr",
            stride_px=CELL if model.factored else STRIDE,
            min_valid=1.0,  # windows inside the raster only, as the others have them
            precision=precision,  # type: ignore[arg-type]
            batch_size=BATCH,
        )
        spent = clocks() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        after = encoder_alone(alone, len(windows))
        gap = 0.0
        rng = np.random.default_rng(0)
        with rasterio.open(scene) as raster:
            grid = WindowGrid(open_imagery(scene).geobox, WINDOW, store.identity.stride_px)
            for k in rng.choice(len(made), COMPARED):
                tile, slots, vectors = made[k]
                rows, cols = store.cells(tile)
                chosen = int(rng.integers(len(slots)))
                i, j = divmod(int(slots[chosen]), cols.stop - cols.start)
                row, col = grid.start(rows.start + i, cols.start + j)
                place = rasterio.windows.Window(col, row, WINDOW, WINDOW)
                itself = alone(torch.from_numpy(raster.read(window=place))[None])
                gap = max(gap, float((itself - vectors[chosen]).abs().max()))
    vectors = torch.cat([vectors for _, _, vectors in made])
    return {
        "version": speciesmap.__version__,
        **measures(len(vectors), spent, (before + after) / 2),
        "memory_mb": memory,
        "from_its_windows": gap,
        "scores": (vectors @ query).sort().values.tolist(),
    }


def clocks() -> NDArray[np.float64]:
    """Seconds of the clock, and seconds that the processor gave this process."""
    return np.array([time.perf_counter(), time.process_time()])


def measures(
    count: int, spent: NDArray[np.float64], encoder_s: NDArray[np.float64]
) -> dict[str, float]:
    """What a run of so many windows is told by.

    Args:
        count: Windows.
        spent: By the run, by both clocks.
        encoder_s: Of the encoder alone for one window, by both clocks.
    """
    return {
        "windows": count,
        "windows_per_s": count / spent[0],
        "encoder_windows_per_s": 1 / encoder_s[0],
        "cpu_s_per_window": spent[1] / count,
        "encoder_cpu_s_per_window": encoder_s[1],
    }


def some_windows(scene: Path) -> torch.Tensor:
    """A batch of the scene's windows in memory, uint8."""
    with rasterio.open(scene) as raster:
        pixels = torch.from_numpy(raster.read())
    windows = pixels.unfold(1, WINDOW, STRIDE).unfold(2, WINDOW, STRIDE).flatten(1, 2)
    return windows[:, :BATCH].transpose(0, 1).contiguous()  # (BATCH, 3, WINDOW, WINDOW)


def encoder_alone(work: Callable[[], object], count: int) -> NDArray[np.float64]:
    """Seconds of a window by both clocks, after one call that does not count."""
    work()
    calls, start = 0, clocks()
    while calls == 0 or clocks()[0] - start[0] < ENCODER_S:
        work()
        calls += 1
    return (clocks() - start) / (calls * count)


def main() -> None:
    """Measure one side and print what it came to."""
    name, scene, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    dim = json.loads((folder / "config.json").read_text())["architecture"]["dim"]
    query = F.normalize(torch.randn(dim, generator=torch.manual_seed(1)), dim=0)
    result = (peer if name in PEERS else ours)(name, scene, folder, query)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
