"""The examples in docstrings show what really happens."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("taxa", "config", "present.styles", "present.warp", "rasters.windows", "outputs")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    module = importlib.import_module(f"speciesmap.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for name in MODULES
        for test in finder.find(importlib.import_module(f"speciesmap.{name}"))
        if test.examples
    ]
    assert len(found) >= 5
