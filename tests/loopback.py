"""Servers on loopback: files by ranges, with faults and a count of bytes, and a STAC API."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONTROL = "/.control"


@dataclass
class State:
    """What a server counts and how it misbehaves.

    Attributes:
        sent: Bytes of bodies sent, by file name.
        requests: Requests by file name.
        lines: Request lines, with their queries.
        refuse: How many requests are still answered 503.
        drop: How many bodies are still cut off after half of their bytes.
        truncated: File names whose ranges beyond the header lack their second half, always.
        token: What `sig` must be in every query, if anything.
        delay_s: Before every answer.
        tagged: Whether answers have an ETag.
    """

    sent: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    refuse: int = 0
    drop: int = 0
    truncated: list[str] = field(default_factory=list)
    token: str = ""
    delay_s: float = 0
    tagged: bool = True


class Server:
    """Serves a folder's files by ranges, from a process of its own.

    A client that holds this process's interpreter lock while it waits would else wait for itself.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address

    @property
    def state(self) -> State:
        """As it is now."""
        with urllib.request.urlopen(self.address + CONTROL, timeout=30) as answer:
            return State(**json.load(answer))

    def set(self, **facts: Any) -> None:
        """Change some of the state."""
        body = json.dumps(facts).encode()
        urllib.request.urlopen(self.address + CONTROL, body, timeout=30).close()

    def forget(self) -> None:
        """Count from nothing."""
        self.set(sent={}, requests={}, lines=[])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    state = State()
    lock = threading.Lock()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        if self.path != CONTROL:
            return self.answer(body=True)
        with self.lock:
            return self.plain(200, json.dumps(asdict(self.state)).encode())

    def do_POST(self) -> None:
        facts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            for name, value in facts.items():
                setattr(self.state, name, value)
        self.plain(200)

    def answer(self, body: bool) -> None:
        state, (name, _, query) = self.state, self.path.lstrip("/").partition("?")
        path = self.folder / name
        with self.lock:
            state.requests[name] = state.requests.get(name, 0) + 1
            state.lines.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
            refuse, state.refuse = state.refuse > 0, max(0, state.refuse - 1)
        time.sleep(state.delay_s)
        if refuse:
            return self.plain(503)
        if state.token and f"sig={state.token}" not in query:
            return self.plain(403)
        if not path.is_file():
            return self.plain(404)
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]) if asked and asked[2] else size, size - 1)
        if first >= size:
            return self.plain(416)
        with path.open("rb") as file:
            file.seek(first)
            part = file.read(last + 1 - first)
        short = name in state.truncated and first > 0
        with self.lock:
            drop = body and state.drop > 0 and first > 0
            state.drop -= drop
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part) // 2 if short else len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if state.tagged:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if not body:
            return None
        if short or drop:
            part = part[: len(part) // 2]
        with self.lock:
            state.sent[name] = state.sent.get(name, 0) + len(part)
        self.wfile.write(part)
        if drop:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def plain(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder until the block ends."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Server(folder, process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait()


def rustac() -> str | None:
    """The STAC server of PyPI's rustac, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("rustac")
    return str(beside) if beside.exists() else shutil.which("rustac")


@contextmanager
def stac_api(
    folder: Path, collection: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Run a real STAC API over items, in memory, and give its address."""
    program = rustac()
    assert program is not None
    (folder / "collection.json").write_text(json.dumps(collection))
    (folder / "items.json").write_text(
        json.dumps({"type": "FeatureCollection", "features": list(items)})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "serve", "-a", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [*words, str(folder / "collection.json"), str(folder / "items.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, "rustac ended"
                time.sleep(0.05)
        yield f"stac+http://127.0.0.1:{port}/#{collection['id']}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    _Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        print(f"http://127.0.0.1:{running.server_address[1]}", flush=True)
        running.serve_forever()
