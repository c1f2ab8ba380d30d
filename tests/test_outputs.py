"""Outputs land whole or not at all."""

from __future__ import annotations

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
