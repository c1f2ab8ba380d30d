"""Outputs land whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speciesmap.errors import OutputError
from speciesmap.outputs import refuse_existing, replacing


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "map.tif"
    with replacing(out) as beside:
        assert beside.suffix == ".tif"
        assert beside.parent == out.parent
        beside.write_text("whole")
        assert not out.exists()
    assert out.read_text() == "whole"
    assert everything(out.parent) == ["map.tif"]


def test_a_failed_block_leaves_no_trace_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    with pytest.raises(ZeroDivisionError), replacing(out) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert everything(tmp_path) == []
    out.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(out, overwrite=True) as beside:
        beside.mkdir()
        (beside / "part").write_text("half")
        raise KeyboardInterrupt
    assert out.read_text() == "old"
    assert everything(tmp_path) == ["map.tif"]


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "old").write_text("old")
    with (
        pytest.raises(OutputError, match=r"run exists already; pass --overwrite"),
        replacing(out) as beside,
    ):
        beside.mkdir()
    assert everything(out) == ["old"]
    with replacing(out, overwrite=True) as beside:
        beside.mkdir()
        (beside / "new").write_text("new")
    assert everything(out) == ["new"]
    assert everything(tmp_path) == ["run"]


@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_file_may_replace_a_folder_and_the_other_way_round(
    tmp_path: Path, old: str, new: str
) -> None:
    out = tmp_path / "out"
    if old == "folder":
        out.mkdir()
        (out / "old").touch()
    else:
        out.write_text("old")
    with replacing(out, overwrite=True) as beside:
        if new == "folder":
            beside.mkdir()
        else:
            beside.write_text("new")
    assert out.is_dir() == (new == "folder")
    assert everything(tmp_path) == ["out"]


@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_link_is_replaced_and_what_it_points_at_kept(tmp_path: Path, new: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").touch()
    out = tmp_path / "out"
    out.symlink_to(target)
    with replacing(out, overwrite=True) as beside:
        if new == "folder":
            beside.mkdir()
        else:
            beside.write_text("new")
    assert not out.is_symlink()
    assert everything(target) == ["kept"]
    assert everything(tmp_path) == ["out", "target"]


def test_refusal_comes_before_work(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "nothing", overwrite=False)
    refuse_existing(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="--overwrite"):
        refuse_existing(tmp_path, overwrite=False)


def test_an_output_never_replaces_what_is_read(tmp_path: Path) -> None:
    scene = tmp_path / "rasters" / "scene.tif"
    scene.parent.mkdir()
    scene.write_text("pixels")
    beside = tmp_path / "rasters2"
    beside.mkdir()
    pattern = str(scene.parent / "*.tif")
    for out, source in ((scene, scene), (scene.parent, scene), (scene.parent, pattern)):
        with pytest.raises(OutputError, match=r"would replace the input .*; give it another name"):
            refuse_existing(out, True, None, source)
    refuse_existing(beside, True, scene, "https://example.org/rasters2", pattern)
    refuse_existing(scene.parent / "maps", False, scene.parent)


def test_the_working_directory_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "project" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    for out in (".", "..", "/", "../../project", str(work)):
        with (
            pytest.raises(OutputError, match="holds the folder you are in"),
            replacing(out, overwrite=True),
        ):
            pass
    with replacing("maps") as beside:
        beside.mkdir()
    assert everything(work) == ["maps"]


def test_a_place_that_cannot_be_written_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.csv").touch()
    with pytest.raises(OutputError, match=r"table\.csv is a file; choose another folder"):
        refuse_existing(tmp_path / "table.csv" / "maps", overwrite=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="may not be written; choose another folder"):
        refuse_existing(tmp_path / "new" / "maps", overwrite=False)


def test_an_error_of_writing_is_told_from_one_of_reading(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for error in (
        PermissionError(13, "Permission denied", str(tmp_path)),
        OSError(28, "No space left on device"),
    ):
        with (
            pytest.raises(OutputError, match=f"cannot write .*out: {error.strerror}"),
            replacing(out) as beside,
        ):
            beside.write_text("half")
            raise error
        assert everything(tmp_path) == []
    with pytest.raises(PermissionError, match=r"photo\.jpg"), replacing(out):
        raise PermissionError(13, "Permission denied", str(tmp_path / "photo.jpg"))


WRITER = """
import sys
from pathlib import Path
from speciesmap.outputs import replacing

with replacing(sys.argv[1]) as beside:
    if sys.argv[2] == "folder":
        beside.mkdir()
        beside = beside / "half"
    beside.write_text("half")
    print("written", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_by_the_next_run_to_the_same_output(
    tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "map [1].tif"
    for name in (".map [1].part.tif", ".other.tif", ".map [1].abcdef-1-00ff.part.tif"):
        (tmp_path / name).touch()
    others = everything(tmp_path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(out), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
    assert len(everything(tmp_path)) == len(others) + 2, "each leaves the other's alone"
    killed, alive = writers
    killed.kill()
    killed.wait()
    with replacing(tmp_path / "map.tif") as beside:
        beside.touch()
        assert len(everything(tmp_path)) == len(others) + 3, "that of another output stays"
    (tmp_path / "map.tif").unlink()
    with replacing(out) as beside:
        beside.write_text("whole")
        assert len(everything(tmp_path)) == len(others) + 2, "the living one's, and this one's"
    assert out.read_text() == "whole"
    out.unlink()
    alive.communicate()
    assert alive.returncode == 0
    assert out.exists()
    assert everything(tmp_path) == sorted([*others, out.name])
