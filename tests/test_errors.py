"""A lack of memory is told as such, and nothing else is."""

from __future__ import annotations

import pytest

from speciesmap.errors import OutputError, ResourceError, within_memory


def test_an_error_that_hides_a_lack_of_memory_is_told_anew() -> None:
    with (
        pytest.raises(ResourceError, match=r"ran out \(cannot allocate 9 bytes\)"),
        within_memory(),
    ):
        try:
            raise OSError("cannot allocate 9 bytes")
        except OSError as error:
            raise OutputError("the store is damaged") from error


def test_what_follows_a_lack_of_memory_is_not_blamed_on_it() -> None:
    @within_memory()
    def again() -> None:
        raise OutputError("out exists")

    try:
        raise MemoryError
    except MemoryError:
        with pytest.raises(OutputError, match="out exists"):
            again()


def test_errors_that_are_each_other_s_cause_end() -> None:
    first, second = OutputError("first"), OutputError("second")
    first.__cause__, second.__cause__ = second, first
    with pytest.raises(OutputError, match="first"), within_memory():
        raise first
