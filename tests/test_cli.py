"""The command line's manners: bboxes in any form, one-line errors, exit codes, help that works."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from speciesmap import cli
from speciesmap.errors import SpeciesmapError


def call(capfd: pytest.CaptureFixture[str], *words: str) -> SimpleNamespace:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    out, err = capfd.readouterr()
    return SimpleNamespace(code=stop.value.code or 0, out=out, err=err)


BOX = (-122.5, 37.25, -121.75, 38.0)


@pytest.mark.parametrize(
    "words",
    [
        ["--bbox", "-122.5", "37.25", "-121.75", "38"],
        ["--bbox", "-122.5,37.25,-121.75,38"],
        ["--bbox=-122.5,37.25,-121.75,38"],
        ["--bbox=-122.5 37.25 -121.75 38"],
        ["--bbox", "-122.5, 37.25, -121.75, 38"],
        ["--bbox", "-122.5,", "37.25,", "-121.75,", "38"],
    ],
    ids=" ".join,
)
def test_a_bbox_may_be_written_as_people_do(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import speciesmap.mapping.embed as room

    seen: dict[str, Any] = {}

    def spy(model: Path, imagery: str, out: Path, **options: Any) -> SimpleNamespace:
        seen.update(options)
        return SimpleNamespace(path=out, geobox=SimpleNamespace(shape=(1, 1)), dim=8)

    monkeypatch.setattr(room, "embed", spy)
    rest = ["--imagery", "a,b.tif", "--out", "s.zarr"]
    for order in ([*words, *rest], [*rest, *words]):
        done = call(capfd, "embed", "run", *order)
        assert (done.code, done.out, done.err) == (0, "s.zarr\n", "")
        assert seen.pop("bbox") == BOX


def test_words_that_are_no_bbox_are_left_alone() -> None:
    words = ["predict", "run", "--text", "oak, old,", "--photo", "a,b.jpg", "--set", "a=1,2"]
    assert cli.split_bbox(words) == words
    after = ["--bbox", "1", "2", "3", "4", "--text", "oak,"]
    assert cli.split_bbox(after) == after


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["embed"],
        ["embed", "run", "--out", "s.zarr"],
        ["embed", "run", "--imagery", "a.tif", "--bbox", "1,2,3", "--out", "s.zarr"],
        ["embed", "run", "--imagery", "a.tif", "--bbox", "a,b,c,d", "--out", "s.zarr"],
        ["train", "config.yaml", "--outt", "run"],
        ["simulate", "--out", "x", "--size-px", "many"],
        ["simulate", "--out", "x", "--seed", "-1"],
        ["chips", "o.csv", "--imagery", "a.tif", "--out", "x", "--seed", "-1"],
        ["demo", "--out", "x", "--seed", "-1"],
        ["umap", "s.zarr", "--out", "x.tif", "--seed", "-1"],
        ["map", "a.tif", "--out", "m.html", "--photos", "tests"],
        ["map", "a.tif", "--out", "m.html", "--observations", "o.csv", "--photos", "nowhere"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_exits_with_2(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    done = call(capfd, *words)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "run", "--species", "Quercus", "agrifolia", "--out", "maps"],
        ["embed", "run", "--imagery", "a.tif", "b.tif", "c.tif", "--out", "s.zarr"],
    ],
    ids=" ".join,
)
def test_words_that_lack_their_quotes_are_explained(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    done = call(capfd, *words)
    assert (done.code, done.out) == (2, "")
    assert "unexpected extra argument" in done.err
    assert """in quotes: "Quercus agrifolia", 'naip/*.tif'""" in done.err


def test_an_error_to_mend_is_one_line_and_exits_with_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = call(capfd, "train", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run"))
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {tmp_path / 'none.yaml'} does not exist; check the path\n"
    assert list(tmp_path.iterdir()) == []


def test_a_message_of_several_lines_is_folded_and_verbose_keeps_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import speciesmap.describe as room

    def fail(path: Path) -> None:
        raise SpeciesmapError("first\n   second")

    monkeypatch.setattr(room, "describe", fail)
    done = call(capfd, "info", "x")
    assert (done.code, done.err) == (1, "error: first second\n")
    with pytest.raises(SpeciesmapError):
        cli.main(["info", "x", "-v"])


def test_what_is_said_goes_to_the_stderr_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import speciesmap.describe as room

    log = logging.getLogger("speciesmap")
    monkeypatch.setattr(room, "describe", lambda path: log.warning("of %s", path))
    for name in ["first", "second"]:
        done = CliRunner().invoke(cli.group, ["info", name])
        assert done.stderr == f"of {name}\n"
    assert log.handlers == [], "a later message would go to a file that is closed"


@pytest.mark.parametrize("words", [["fly"], ["info", "--help"], ["info", "x", "-v"]])
def test_a_call_gives_the_process_back_as_it_was(words: list[str]) -> None:
    log = logging.getLogger("speciesmap")

    def state() -> tuple[object, ...]:
        return log.level, list(log.handlers), signal.getsignal(signal.SIGTERM)

    before = state()
    with pytest.raises((SystemExit, SpeciesmapError)):
        cli.main(words)
    assert state() == before


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import speciesmap.describe as room

    def fail(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(room, "describe", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "x"])


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("info", "path"),
        ("evaluate", "data"),
        ("umap", "store"),
        *((command, "like") for command in ("chips", "embed", "predict")),
    ],
)
def test_an_address_keeps_its_slashes(command: str, name: str) -> None:
    found = cli.group.get_command(click.Context(cli.group), command)
    assert found is not None
    (param,) = (p for p in found.params if p.name == name)
    for address in ("https://host.example/a.tif", "hf://datasets/owner/name"):
        assert param.type.convert(address, param, None) == address
    assert param.type.convert("folder/a.tif", param, None) == Path("folder/a.tif")


def test_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"]):
        done = call(capfd, *words)
        assert (done.code, done.err) == (0, "")
        for name, summary in cli.COMMANDS.items():
            assert f"  {name} " in done.out
            assert summary.split()[0] in done.out


def load(name: str) -> click.Command:
    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_help_ends_with_examples_that_parse(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    done = call(capfd, name, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: speciesmap {name} ")
    command = load(name)
    last = (command.help or "").strip().split("\n\n")[-1].replace("\b\n", "")
    heading, _, body = last.partition("\n")
    assert heading.strip() == "Example:"
    examples = [shlex.split(line) for line in body.replace("\\\n", " ").splitlines()]
    own = [words for words in examples if words[:2] == ["speciesmap", name]]
    assert own, f"no example calls speciesmap {name}"
    for words in examples:
        assert words[0] == "speciesmap"
        with load(words[1]).make_context(words[1], cli.split_bbox(words[2:])) as context:
            assert context.params


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_says_what_it_is(name: str) -> None:
    for parameter in load(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"speciesmap {name} {parameter.opts[0]} has no help"


FRESH = """
import importlib, sys
from speciesmap import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
for name in cli.COMMANDS:
    importlib.import_module(f"speciesmap.cli.{name}")
heavy = {"torch", "rasterio", "lightning", "pandas", "numpy", "numba", "datasets", "rich"}
print("loaded", sorted(heavy & set(sys.modules)))
"""


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, "--help"], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("loaded []\n"), done.stdout + done.stderr


def test_the_version_is_told_also_by_the_module(capfd: pytest.CaptureFixture[str]) -> None:
    done = call(capfd, "--version")
    assert done.code == 0
    assert done.out.startswith("speciesmap")
    words = [sys.executable, "-m", "speciesmap", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == done.out


def test_a_terminated_command_leaves_nothing(tmp_path: Path) -> None:
    words = ["simulate", "--out", str(tmp_path / "scene"), "--size-px", "2048", "-q"]
    run = subprocess.Popen([sys.executable, "-m", "speciesmap", *words])
    while not list(tmp_path.iterdir()):
        assert run.poll() is None
        time.sleep(0.02)
    run.terminate()
    assert run.wait() == 143
    assert list(tmp_path.iterdir()) == []


def test_a_lack_of_memory_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import speciesmap.mapping.embed as room

    def embed(*words: Any, **options: Any) -> None:
        np.empty((1 << 30, 1 << 30), np.uint8)

    monkeypatch.setattr(room, "embed", embed)
    done = call(capfd, "embed", "run", "--imagery", "a.tif", "--out", "s.zarr")
    assert done.code == 1
    assert done.err.startswith(
        "error: memory or threads ran out (Unable to allocate 1.00 EiB for an"
    )
    assert done.err.count("\n") == 1
