"""How fast the engine is here, against the encoder alone and against the processor."""

from __future__ import annotations

import logging
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from affine import Affine
from odc.geo.geobox import GeoBox
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from speciesmap.errors import ImageryError
from speciesmap.mapping.cut import cut_windows
from speciesmap.mapping.embed import MIN_VALID
from speciesmap.mapping.encode import Encoder, Stopwatch, compile_encode
from speciesmap.mapping.fit import fit_imagery
from speciesmap.mapping.tiles import Precision, encode_tiles
from speciesmap.models import SpeciesModel, load_model
from speciesmap.models.device import choose_device
from speciesmap.rasters.geotiff import write_geotiff
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.store import EmbeddingStore, Identity
from speciesmap.rasters.windows import WindowGrid

PRODUCT = 2048  # side of the square matrices whose product is the yardstick
PRODUCT_SECONDS = 1.0

log = logging.getLogger("speciesmap")


def benchmark(
    model: SpeciesModel | Path | str,
    imagery: Imagery | Path | str | None = None,
    *,
    bands: Sequence[str] | None = None,
    stride_px: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    compiled: bool = False,
    any_resolution: bool = False,
    seconds: float = 20.0,
) -> dict[str, Any]:
    """Measure the engine on this machine.

    First the encoder alone encodes windows that lie in memory, one batch again and again; then
    the engine encodes tiles from the middle of the imagery outwards into a store that is thrown
    away. A factored encoder is compared with itself encoding every window on its own.

    Args:
        model: A model or its folder.
        imagery: As for `embed`; noise of the model's bands by default.
        bands: As for `embed`.
        stride_px: As for `embed`.
        batch_size: As for `embed`.
        device: As for `embed`.
        precision: As for `embed`.
        compiled: As for `embed`.
        any_resolution: As for `embed`.
        seconds: About how long the encoder, and then the engine, are measured.

    Returns:
        `windows_per_s` and `encoder_windows_per_s` with their `ratio`; `tflops` achieved by the
        encoder, of `product_tflops` by a product of square matrices, and their `share_of_product`;
        `engine_s` that the engine was measured, and its `seconds` by stage, which overlap, where
        `wait` is the time the encoder waited for pixels;
        `peak_memory_mb` of the process and `peak_gpu_memory_mb`; and what was measured.

    Raises:
        ImageryError: The imagery cannot be read, does not fit the model, or has no valid window.
        ModelError: The model cannot be read.
    """
    if isinstance(model, str | Path):
        model = load_model(model)
    place = choose_device(device)
    with tempfile.TemporaryDirectory(prefix="speciesmap-") as folder:
        if imagery is None:
            imagery = _noise(model, Path(folder) / "noise.tif")
        imagery = fit_imagery(model, imagery, bands=bands, any_resolution=any_resolution)
        store = _empty_store(model, imagery, stride_px, Path(folder) / "store.zarr")
        tiles = _from_the_middle(store)
        encoder = Encoder(model, place, batch_size, compiled)
        model.eval()
        windows = _some_windows(model, imagery, store, tiles, encoder.windows)
        encoder.precision = encoder.agreed(windows) if precision == "auto" else precision
        alone, tflop = _encoder_alone(model, encoder, windows, seconds)

        watch = Stopwatch()
        count, started = 0, time.perf_counter()
        planned = max(1, round(alone * seconds * (1 if encoder.piece_px is None else 8) / 1024))
        tiles = tiles[:planned]
        chosen: Any = encoder.precision
        count = encode_tiles(
            model,
            imagery,
            store,
            tiles,
            batch_size=encoder.windows,
            device=str(place),
            precision=chosen,
            compiled=compiled,
            stopwatch=watch,
        )
        stages = watch.settle()
        elapsed = time.perf_counter() - started
    if elapsed < seconds / 4:
        log.warning(
            "the imagery's %d tiles were encoded in %.1f s, too few to tell the engine's speed by; "
            "give larger --imagery, or fewer --seconds",
            len(tiles),
            elapsed,
        )
    product = _product_tflops(place, chosen)
    result: dict[str, Any] = {
        "device": _name(place),
        "threads": torch.get_num_threads() if place.type == "cpu" else None,
        "torch": torch.__version__,
        "backbone": model.architecture.aerial["backbone"],
        "encoder": "plain" if encoder.piece_px is None else "factored",
        "precision": chosen,
        "compiled": compiled,
        "batch_size": encoder.windows,
        "window_px": model.window_px,
        "stride_px": store.identity.stride_px,
        "tiles": len(tiles),
        "windows": count,
        "engine_s": elapsed,
        "windows_per_s": count / elapsed,
        "encoder_windows_per_s": alone,
        "ratio": count / elapsed / alone,
        "tflops": alone * tflop,
        "product_tflops": product,
        "share_of_product": alone * tflop / product,
        "seconds": {name: stages[name] for name in ("read", "copy", "encode", "write", "wait")},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_gpu_memory_mb": torch.cuda.max_memory_allocated(place) / 2**20
        if place.type == "cuda"
        else None,
    }
    return result


def _noise(model: SpeciesModel, path: Path) -> Path:
    """Write noise of the model's bands, large enough for four whole tiles at a quarter's stride."""
    side = 18 * model.window_px
    pixels = np.random.default_rng(0).integers(1, 255, (len(model.bands), side, side), np.uint8)
    r = model.resolution_m
    grid = GeoBox((side, side), Affine(r, 0, 550_000, 0, -r, 4_180_000), "EPSG:32610")
    return write_geotiff(path, pixels, grid, bands=model.bands)


def _empty_store(
    model: SpeciesModel, imagery: Imagery, stride_px: int | None, path: Path
) -> EmbeddingStore:
    stride = stride_px or max(1, model.window_px // 4)
    identity = Identity(
        model.fingerprint,
        model.window_px,
        stride,
        imagery.bands,
        imagery.fingerprint,
        MIN_VALID,
    )
    cells = WindowGrid(imagery.geobox, model.window_px, stride).geobox
    return EmbeddingStore.create(path, identity, cells, model.dim, source=imagery.source)


def _from_the_middle(store: EmbeddingStore) -> list[tuple[int, int]]:
    """All tiles, those in the middle first: they are whole, and no margin of nodata is near."""
    rows, cols = store.tiles
    tiles = list(store.tiles_in(*(slice(0, side) for side in store.geobox.shape)))
    return sorted(tiles, key=lambda t: max(abs(t[0] + 0.5 - rows / 2), abs(t[1] + 0.5 - cols / 2)))


def _some_windows(
    model: SpeciesModel,
    imagery: Imagery,
    store: EmbeddingStore,
    tiles: Sequence[tuple[int, int]],
    count: int,
) -> Tensor:
    """Give a full batch of windows, those there are again and again if need be."""
    for batch in cut_windows(imagery, store, tiles, model.fill, count):
        if batch.pixels is not None:
            repeats = -(-count // len(batch.pixels))
            return batch.pixels.repeat(repeats, 1, 1, 1)[:count]
    raise ImageryError(f"{imagery.source} has no window with enough valid pixels to encode")


def _encoder_alone(
    model: SpeciesModel, encoder: Encoder, windows: Tensor, seconds: float
) -> tuple[float, float]:
    """Windows per second of the encoder, every window by itself, and TFLOP of one window."""
    there = windows.to(encoder.device)
    call: Callable[[Tensor], Tensor] = model.encode_aerial
    if encoder.compiled:
        call = compile_encode(call, len(windows), encoder.device)

    def run() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(
                encoder.device.type, torch.bfloat16, enabled=encoder.precision == "bfloat16"
            ),
        ):
            F.normalize(call(there).float(), dim=1)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.encode_aerial(there[:1])
    with torch.autocast(encoder.device.type, enabled=False):  # outermost, as the engine has it
        return len(windows) / _seconds_each(run, seconds), counter.get_total_flops() / 1e12


def _product_tflops(place: torch.device, precision: str) -> float:
    """TFLOP/s of a product of large square matrices."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=place).to(kind)

    def run() -> None:
        torch.mm(a, b)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    return 2 * PRODUCT**3 / _seconds_each(run, PRODUCT_SECONDS) / 1e12


def _seconds_each(run: Callable[[], None], seconds: float) -> float:
    """Time of a call, over about so many seconds after one that does not count."""
    run()
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        run()
        calls += 1
    return (time.perf_counter() - started) / calls


def _name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
