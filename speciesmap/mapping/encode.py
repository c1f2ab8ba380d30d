"""Batches of pixels to vectors: device, precision, compilation, and what the time goes into."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from speciesmap.errors import ResourceError, is_out_of_memory
from speciesmap.mapping.cut import Layout
from speciesmap.models import SpeciesModel
from speciesmap.models.device import computes_bfloat16
from speciesmap.rasters.store import TILE

LEAST_COSINE = 0.999  # of bfloat16 against float32, on every one of some real windows
BATCH_PX_CPU = 8 * 256**2  # few enough for what lies between two layers to stay in its caches
BATCH_PX_GPU = 256 * 256**2
MOST_WINDOWS = TILE**2 // 4  # of a batch by default: those of a tile's end are shorter
KEPT_BYTES = 64 << 20  # of encoded pieces that neighbouring tiles share

Item = TypeVar("Item")
Encode = Callable[[Tensor], Tensor]
log = logging.getLogger("speciesmap")


class Stopwatch:
    """Seconds that each stage of the engine takes, in whatever thread it runs.

    Attributes:
        seconds: By stage: `read` and cut, `copy` to a GPU, `encode`, `write`, and `wait`, the time
            in which the encoder was given nothing because reading lagged behind.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, stage: str, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
        """Time a block, or the work that it queues on a GPU's stream."""
        if stream is not None:
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            ends[0].record(stream)
            yield
            ends[1].record(stream)
            self._events.append((stage, ends[0], ends[1]))
            while self._events and self._events[0][2].query():  # type: ignore[no-untyped-call]
                self._count()
            return
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started  # type: ignore[assignment]

    def reading(self, items: Iterator[Item]) -> Iterator[Item]:
        """Time the making of items as `read`."""
        return self._making("read", items)

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Time the waiting for items as `wait`."""
        return self._making("wait", items)

    def _making(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        end = object()
        while True:
            with self(stage):
                item = next(items, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def settle(self) -> Counter[str]:
        """Wait for GPUs and give the seconds."""
        while self._events:
            self._events[0][2].synchronize()
            self._count()
        return self.seconds

    def _count(self) -> None:
        stage, start, end = self._events.popleft()
        self.seconds[stage] += start.elapsed_time(end) / 1000


class Encoder:
    """Encodes the pieces of tiles, and puts windows together from them.

    A piece is a whole window, or the cell of a factored encoder.

    Args:
        model: Whose aerial tower encodes; it is moved to the device.
        device: Where.
        windows: Windows encoded at once; by default as many pixels as 8 windows of 256 px have on
            a CPU, 256 of them on a GPU, and 256 at most. Halved for good where memory runs out.
        compiled: Use `torch.compile`.
        spent: Told how long copies take.

    Attributes:
        compiled: Whether `torch.compile` is used.
        precision: `float32` or `bfloat16`; to be set before anything is encoded.
        windows: Most windows at once.
        pieces: Most pieces at once, which are as many pixels.
        piece_px: Side of a piece, or `None` where windows are encoded whole.
    """

    def __init__(
        self,
        model: SpeciesModel,
        device: torch.device,
        windows: int | None = None,
        compiled: bool = False,
        spent: Stopwatch | None = None,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self.precision: str | None = None
        batch_px = BATCH_PX_CPU if device.type == "cpu" else BATCH_PX_GPU
        self.windows = windows or min(MOST_WINDOWS, max(1, batch_px // model.window_px**2))
        tower = model.factored
        self.piece_px = None if tower is None else tower.cell_px
        self.pieces = self.windows if tower is None else self.windows * tower.side**2
        self._piece: Encode = model.encode_aerial if tower is None else tower.encode_cells
        self._whole: Encode | None = None if tower is None else tower.encode_tokens
        self._share = 1.0  # of the batch that fits into memory
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # by the hash of their pixels
        self.compiled = compiled
        self.spent = spent or Stopwatch()
        if compiled:
            self._piece = compile_encode(self._piece, self.pieces, device)
            self._whole = self._whole and compile_encode(self._whole, self.pieces, device)
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The GPU's stream that encodes, if it is a GPU that does."""
        cuda = self.device.type == "cuda"
        return torch.cuda.current_stream(self.device) if cuda else None

    @torch.inference_mode()
    def encode(self, pixels: Tensor, shared: bool = False) -> Tensor:
        """Encode pieces.

        Args:
            pixels: Raw, in host memory, shape (N, B, S, S).
            shared: Keep what comes of them for a while, and take it again for the same pixels. It
                is the same to the last bit, so that a tile does not tell which were done before.

        Returns:
            What comes of each piece, on the device, shape (N, F).
        """
        if not shared:
            return self._in_parts(lambda part: self._piece(self._there(part)), pixels, self.pieces)
        key = hashlib.blake2b(pixels.numpy().data, digest_size=16).digest()
        encoded = self._kept.pop(key, None)
        if encoded is None:
            encoded = self.encode(pixels)
        self._kept[key] = encoded
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return encoded

    @torch.inference_mode()
    def assemble(self, encoded: Sequence[Tensor], layout: Layout) -> Tensor | None:
        """Put the windows of a tile together.

        Args:
            encoded: Pieces in the order they were cut.
            layout: Which of them each window is made of.

        Returns:
            Unit vectors in the order of the layout's slots, float32, shape (W, D); `None` where
            there are no windows.
        """
        if not encoded:
            return None
        pieces = torch.cat(list(encoded))  # (M, F)
        if self._whole is not None:
            whole, tokens = self._whole, pieces
            numbers = torch.from_numpy(layout.pieces).to(self.device)  # (W, T)
            pieces = self._in_parts(lambda part: whole(tokens[part]), numbers, self.pieces)
        return F.normalize(pieces.float(), dim=1)  # (W, D)

    @torch.inference_mode()
    def agreed(self, windows: Tensor) -> str:
        """Choose `bfloat16` where the processor has it and it agrees with float32.

        Args:
            windows: Real ones, raw, shape (N, B, P, P).
        """
        if not computes_bfloat16(self.device):
            return "float32"
        vectors = []
        for precision in ("float32", "bfloat16"):
            self.precision = precision
            part = self._in_parts(
                lambda part: self.model.encode_aerial(self._there(part)), windows, self.windows
            )
            vectors.append(F.normalize(part.float(), dim=1))
        cosine = float((vectors[0] * vectors[1]).sum(dim=1).min())
        chosen = "bfloat16" if cosine >= LEAST_COSINE else "float32"
        log.info("encoding in %s; bfloat16 has a cosine of %.5f to float32", chosen, cosine)
        return chosen

    def _there(self, pixels: Tensor) -> Tensor:
        """Copy to the device, on a GPU beside the encoding of what was copied before."""
        if self._copies is None:
            return pixels
        with torch.cuda.stream(self._copies), self.spent("copy", self._copies):
            copied = pixels.to(self.device, non_blocking=True)
        encoding = torch.cuda.current_stream(self.device)
        encoding.wait_stream(self._copies)
        copied.record_stream(encoding)
        return copied

    def _in_parts(self, work: Encode, inputs: Tensor, most: int) -> Tensor:
        """Do work on inputs, in halves of the batch and halves of these where memory runs out."""
        done: list[Tensor] = []
        start = 0
        while start < len(inputs):
            size = max(1, int(most * self._share))
            part = inputs[start : start + size]
            try:
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
                ):
                    done.append(work(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    raise ResourceError(
                        f"not even one window can be encoded in the memory there is ({reason}); "
                        "use a smaller model, or another --device"
                    ) from error
                self._share = len(part) // 2 / most
                log.warning(
                    "out of memory with %d %s at once; going on with %d",
                    len(part),
                    "windows" if self.piece_px is None else "cells",
                    max(1, int(most * self._share)),
                )
                continue
            start += size
        return done[0] if len(done) == 1 else torch.cat(done)


def compile_encode(function: Encode, size: int, device: torch.device) -> Encode:
    """Compile a function for full batches, and say what that costs; shorter ones it takes as is."""
    fast = torch.compile(function, dynamic=False, options={"freezing": device.type == "cpu"})
    told = False

    def timed(inputs: Tensor) -> Tensor:
        nonlocal told
        if len(inputs) < size:
            return function(inputs)
        started = time.perf_counter()
        outputs = fast(inputs)
        if not told:
            log.info("torch.compile took %.1f s to start", time.perf_counter() - started)
            told = True
        return outputs

    return timed
