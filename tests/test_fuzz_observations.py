"""Damaged files of any form are read or refused; `fuzz_observations.py` does it at length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz_observations import damage, damaged_archive, read, tables
from hypothesis import given, settings
from hypothesis import strategies as st

WHOLE = tables()
pytestmark = pytest.mark.filterwarnings("ignore:.*GPKG application_id:RuntimeWarning")


@pytest.mark.parametrize("form", WHOLE)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_table_is_read_or_refused_on_one_line(
    tmp_path_factory: pytest.TempPathFactory, form: str, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damage(WHOLE[form], random.Random(seed)))
    read(path)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_archive_is_read_or_refused_and_writes_nowhere(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "archives" / "deep"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.zip").write_bytes(damaged_archive(random.Random(seed)))
    read(folder / "a.zip")
    assert [p.name for p in folder.parent.rglob("*")] == ["deep", "a.zip"]


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(content)
    read(path)


@pytest.mark.parametrize("form", WHOLE)
def test_what_is_damaged_was_whole(tmp_path: Path, form: str) -> None:
    (tmp_path / "whole").write_bytes(WHOLE[form])
    assert read(tmp_path / "whole")
