"""Bounds that no reading may pass, and strategies that damage files and trees of values."""

from __future__ import annotations

import copy
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st

SECONDS = 10
BYTES = 1 << 30

Run = Callable[[Any], None]

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
    "socket.connect", "webbrowser.open",
}  # fmt: skip
watched: list[Path] = []


class Breach(BaseException):
    """Input that made the reader do what no input may."""


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse programs, unpickling, and writing outside the folder that is watched."""
    if not watched:
        return
    if event in FORBIDDEN:
        raise Breach(f"{event} {arguments!r:.100}")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
        writes = set(arguments[1]) & set("wax+")
        place = Path(arguments[0]).absolute()
        if writes and not place.is_relative_to(watched[-1]) and place != Path(os.devnull):
            raise Breach(f"wrote {place}")


sys.addaudithook(audit)


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Bound the time and the memory of one reading, and watch what it does."""

    def stop(*_: Any) -> None:
        raise Breach(f"took more than {SECONDS} s of the processor, or {6 * SECONDS} s")

    old = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(6 * SECONDS)
    watched.append(folder)
    try:
        yield
    except MemoryError as error:
        raise Breach("took more than 1 GB") from error
    finally:
        watched.pop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- strategies

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, 10**12, -(2**40)]),
    st.floats(), st.text(max_size=12), st.just([]), st.just({}), st.just([[]]),
    st.sampled_from(["../../x", "/etc/passwd", "nan", "1e400", "!!python/object:os.system x"]),
)  # fmt: skip


JSON = st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'{"format": ' + b"9" * 5000 + b"}", b"null",
     b"[]", b"{}", b"NaN", b'"\\ud800"', b"\xef\xbb\xbf{}", b""]
)  # fmt: skip


@st.composite
def damaged(draw: Any, originals: list[bytes]) -> bytes:
    """A file with bytes changed, cut out, repeated or added, mostly near its head."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 6]))):
        if not data:
            break
        near = min(len(data), draw(st.sampled_from([64, 512, 4096, 1 << 30, 1 << 30])))
        at = draw(st.integers(0, near - 1))
        what = draw(st.sampled_from(["set", "set", "word", "cut", "end", "copy", "put"]))
        if what == "set":
            data[at] = draw(st.integers(0, 255))
        elif what == "word":
            word = draw(st.sampled_from([0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000]))
            data[at : at + 4] = word.to_bytes(4, draw(st.sampled_from(["little", "big"])))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif what == "end":
            del data[at:]
        elif what == "copy":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


@st.composite
def twisted(draw: Any, originals: list[Any]) -> Any:
    """A JSON-like value with some of its parts replaced, removed, renamed or nested."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        node = value
        for _ in range(draw(st.integers(0, 4))):
            inner = list(node.values() if isinstance(node, dict) else node)
            inner = [child for child in inner if isinstance(child, dict | list) and child]
            if not inner:
                break
            node = draw(st.sampled_from(inner))
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        what = draw(st.sampled_from(["odd", "odd", "gone", "name", "nest"]))
        if what == "odd":
            node[key] = copy.deepcopy(draw(ODD))
        elif what == "gone":
            del node[key]
        elif what == "name" and isinstance(node, dict):
            node[draw(st.text(max_size=8))] = node.pop(key)
        else:
            node[key] = [node[key]]
    return value
