"""Encoding on several processes or machines, through Dask's `distributed`.

Only paths and the numbers of tiles travel. Each worker loads the model once, reads its own pixels
and writes its own tiles, so the store is what one process makes of it; a tile that was in flight
on a worker that died is encoded by another.
"""

from __future__ import annotations

import logging
import os
import pydoc
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from speciesmap import __version__
from speciesmap.errors import (
    ClusterError,
    DependencyError,
    SpeciesmapError,
    within_memory,
)
from speciesmap.mapping.fit import fit_imagery
from speciesmap.mapping.tiles import Precision, encode_tiles
from speciesmap.models import SpeciesModel, load_model
from speciesmap.progress import at_level, track
from speciesmap.rasters.imagery import Imagery
from speciesmap.rasters.store import EmbeddingStore, Identity, open_store

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 30
TASK_TILES = 4  # at most: within a task, reading and writing go on beside encoding
NAMED = 20  # tiles in a message
TASKS_PER_WORKER = 4  # at least, so that workers end at about the same time
WATCH_S = 10

log = logging.getLogger("speciesmap")


@dataclass(frozen=True)
class Job:
    """What a worker must know beside the numbers of its tiles; all of it is paths and settings.

    Attributes:
        model: Folder of the model.
        imagery: Closed, with the paths of its files.
        store: Path of the store.
        identity: The store's.
        bands: As for `embed`.
        any_resolution: As for `embed`.
        batch_size: As for `embed`.
        device: As for `embed`; by default each worker chooses, and several workers on one machine
            take its GPUs in turn.
        precision: As for `embed`.
        compiled: As for `embed`.
        skip_unreadable: As for `embed`.
        threads: Of torch in each worker; torch's own choice, or the scheduler's, by default.
    """

    model: str
    imagery: Imagery
    store: str
    identity: Identity
    bands: tuple[str, ...] | None
    any_resolution: bool
    batch_size: int | None
    device: str | None
    precision: Precision
    compiled: bool
    skip_unreadable: bool
    threads: int | None = None


def encode_on_cluster(
    job: Job,
    store: EmbeddingStore,
    tiles: Sequence[tuple[int, int]],
    *,
    workers: int = 0,
    scheduler: str | None = None,
) -> int:
    """Encode tiles on the workers of a Dask cluster.

    Args:
        job: What to do; its paths must lead to the same files on every worker.
        store: The job's store.
        tiles: Row and column of each.
        workers: Processes to start on this machine, where no scheduler is named.
        scheduler: Address of a running one, such as `tcp://node1:8786`.

    Returns:
        Number of windows encoded.

    Raises:
        ClusterError: The scheduler does not answer, workers keep dying or cannot take tasks.
        DependencyError: `distributed` is not installed.
        SpeciesmapError: What `encode_tiles` raises, on a worker.
    """
    if not tiles:
        return 0
    try:
        import distributed
        from distributed.client import FutureCancelledError
        from distributed.comm.core import CommClosedError
    except ImportError as error:
        raise DependencyError(
            "--workers and --scheduler need Dask; install it with pip install 'speciesmap[cluster]'"
        ) from error

    if scheduler is None:
        job = replace(job, threads=max(1, len(os.sched_getaffinity(0)) // workers))
    encode, windows, lost = partial(_encode, job), 0, list[tuple[int, int]]()
    with store.writing(), _client(workers, scheduler) as client, _watched(client):
        try:
            _refuse_unlike(client)
            # the first worker settles the precision, as a single process does by its first tile
            windows, lost = client.submit(encode, tiles[:1], pure=False).result()
            known = max(1, len(_workers(client)))
            size = max(1, min(TASK_TILES, len(tiles) // (known * TASKS_PER_WORKER)))
            rest = [tiles[k : k + size] for k in range(1, len(tiles), size)]
            futures = client.map(encode, rest, pure=False)
            for future in track(distributed.as_completed(futures), "Encoding", len(futures)):
                done, empty = future.result()
                windows, lost = windows + done, lost + empty
        except SpeciesmapError:
            raise
        except distributed.KilledWorker as error:
            raise ClusterError(
                f"{error.allowed_failures + 1} workers died of the same tiles, the last at "
                f"{error.last_worker.address}; give them more memory or a smaller --batch-size, "
                "and run again: tiles that are done are kept"
            ) from error
        except (CommClosedError, FutureCancelledError) as error:
            raise ClusterError(
                "the connection to the cluster was lost; see that its scheduler runs, and run "
                "again: tiles that are done are kept"
            ) from error
        except Exception as error:
            raise ClusterError(
                f"a worker could not do its task ({type(error).__name__}: {error}); see that it "
                "has the same speciesmap and libraries as this machine, and memory enough; its own "
                "log says more, and tiles that are done are kept"
            ) from error
    log.info("encoded %d windows of %d tiles on %d workers", windows, len(tiles), known)
    if lost:
        log.warning(
            "%d tiles could not be read and stay empty, the workers say why: %s; another run tries "
            "them again",
            len(lost),
            ", ".join(map(str, sorted(lost)[:NAMED])) + ", ..." * (len(lost) > NAMED),
        )
    return windows


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Client]:
    """Connect to a cluster, or start one on this machine that ends with the block."""
    import dask.config
    from distributed import Client, LocalCluster
    from distributed.comm.addressing import get_address_host_port, parse_address

    with ExitStack() as stack:
        connect = {"distributed.comm.timeouts.connect": f"{CONNECT_S}s"}
        stack.enter_context(dask.config.set(connect))
        if scheduler is None:
            stack.callback(_give_back, dict(os.environ))  # Dask sets what workers shall inherit
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=None,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,  # errors of workers are raised here
            )
            yield stack.enter_context(Client(stack.enter_context(cluster)))
            return
        # errors are raised here
        stack.enter_context(at_level(logging.CRITICAL, "distributed.client"))
        try:
            # Dask tries a closed port until its time is over, and waits for ever where another
            # kind of server is silent: a scheduler speaks first
            if parse_address(scheduler)[0] == "tcp":
                there = get_address_host_port(scheduler)
                with socket.create_connection(there, CONNECT_S) as probe:
                    probe.recv(1)
            client = Client(scheduler, timeout=CONNECT_S)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(
                f"no scheduler answers at {scheduler} ({error}); start one with `dask scheduler` "
                "and give the tcp:// address that it tells, or use --workers"
            ) from error
        yield stack.enter_context(client)


def _give_back(environment: Mapping[str, str]) -> None:
    """Let the variables of this process be again what they were."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _refuse_unlike(client: Client) -> None:
    """Refuse workers that have no speciesmap or another one: a task could only kill them."""
    ask = partial(pydoc.locate, "speciesmap.__version__")  # which any worker can take
    client.submit(ask, pure=False).result()  # waits for a first worker
    for address, found in client.run(ask, on_error="return").items():
        if isinstance(found, OSError):
            continue  # lost meanwhile; others do its tiles
        if isinstance(found, Exception):
            raise found
        if found != __version__:
            other = f"speciesmap {found}" if found else "no speciesmap"
            raise ClusterError(
                f"the worker at {address} has {other}, this machine {__version__}; install the "
                "same on both"
            )


def _workers(client: Client) -> dict[str, Any]:
    """What the scheduler knows of its workers now, by address."""
    assert client.scheduler is not None
    known: dict[str, Any] = client.sync(client.scheduler.identity)["workers"]
    return known


@contextmanager
def _watched(client: Client) -> Iterator[None]:
    """Say so where no worker is left that runs: the scheduler waits for others without a word."""
    ended = threading.Event()

    def watch() -> None:
        had, waited = False, False
        while not ended.is_set():
            with suppress(Exception):  # a lost connection is told to who waits for results
                workers = _workers(client)
                states = Counter(worker["status"] for worker in workers.values())
                waits = not states["running"]
                if waits and not waited and not ended.is_set():
                    why = "are none left, and their logs may say why" if had else "are none yet"
                    if states["paused"]:
                        why = f"are {states['paused']}, paused near their memory limit"
                    log.warning("waiting for workers: there %s; Ctrl-C keeps what is done", why)
                had, waited = had or bool(workers), waits
            ended.wait(WATCH_S)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join(timeout=1)


@lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[SpeciesModel, Imagery, str | None]:
    """What a worker keeps open from task to task: no store, which may be begun anew meanwhile."""
    from distributed import get_worker

    model = load_model(job.model)
    imagery = fit_imagery(model, job.imagery, bands=job.bands, any_resolution=job.any_resolution)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device, name = job.device, get_worker().name
    gpus = torch.cuda.device_count()
    if device is None and gpus > 1 and isinstance(name, int):
        device = f"cuda:{name % gpus}"
    return model, imagery, device


def _encode(job: Job, tiles: Sequence[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
    """Encode the tiles that are not done, on a worker; give windows, and tiles not read."""
    try:
        with within_memory():
            model, imagery, device = _opened(job)
            store = open_store(job.store)
            store.refuse_other(
                replace(
                    job.identity,
                    model=model.fingerprint,
                    imagery=imagery.fingerprint,
                    bands=imagery.bands,
                )
            )
            windows = encode_tiles(
                model,
                imagery,
                store,
                [tile for tile in tiles if not store.has(tile)],
                batch_size=job.batch_size,
                device=device,
                precision=job.precision,
                compiled=job.compiled,
                skip_unreadable=job.skip_unreadable,
            )
        return windows, [tile for tile in tiles if not store.has(tile)]
    except SpeciesmapError as error:
        failure = type(error)(str(error))
    raise failure  # by itself: causes from other libraries may not travel
