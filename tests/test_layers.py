"""The house: imports point one way, pixels have one door in and one out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "speciesmap"

WORDS = {"errors", "taxa", "config", "progress"}
DATA = {"outputs", "observations", "rasters", "datasets", "simulate"}
PROCEDURES = {"models", "statistics", "mapping", "learning", "evaluation"}
WAYS = {"atlas", "appraise", "describe"}
MAY_IMPORT = {
    **dict.fromkeys(WORDS, WORDS),
    **dict.fromkeys(DATA, WORDS | DATA),
    "present": WORDS | DATA,
    "models": WORDS | DATA,
    "statistics": WORDS | {"models"},
    "mapping": WORDS | DATA | {"models"},
    "learning": WORDS | DATA | {"models", "statistics", "mapping"},
    "evaluation": WORDS | DATA | PROCEDURES - {"evaluation"},
    **dict.fromkeys(WAYS, WORDS | DATA | PROCEDURES | {"present"}),
    "demo": WORDS | DATA | PROCEDURES | WAYS | {"present"},
}
"""What each room may import beside itself; cli and what calls it may import all."""
WITHIN_DATA = {
    "outputs": set[str](),
    "rasters": {"outputs"},
    "observations": {"outputs", "rasters"},
    "datasets": {"outputs", "rasters", "observations"},
    "simulate": {"outputs", "rasters"},
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
"""All but the package's own facade, which loads its names when they are first used."""

each = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(ast.parse(path.read_text(encoding="utf-8")))]
    found = {name[1] for name in names if name[0] == "speciesmap" and len(name) > 1}
    return found - {"__version__"}


@each
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    if here not in {"cli", "__main__"}:
        assert here in MAY_IMPORT, f"{here} is a new room; give it a layer"
        beyond = rooms_imported(path) - MAY_IMPORT[here] - {here}
        assert not beyond, f"{here} must not import {sorted(beyond)}"


@each
def test_within_data_rasters_come_before_observations_before_data_sets(path: Path) -> None:
    here = room(path)
    if here in WITHIN_DATA:
        beyond = rooms_imported(path) & DATA - WITHIN_DATA[here] - {here}
        assert not beyond, f"{here} must not import {sorted(beyond)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {
        ".".join(("speciesmap", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): p
        for p in FILES
    }
    graph = {}
    for module, path in modules.items():
        names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
        names |= {name.rpartition(".")[0] for name in names}
        graph[module] = names & modules.keys() - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files
    assert "speciesmap.mapping.tiles" in graph["speciesmap.mapping.embed"]


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@each
def test_rasters_are_opened_at_one_door_and_written_at_another(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "rasterio":
            assert "open" not in {alias.name for alias in node.names}, "write rasterio.open"
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name == "rasterio.open":
            mode = node.args[1] if len(node.args) > 1 else None
            mode = next((k.value for k in node.keywords if k.arg == "mode"), mode)
            reading = mode is None or (isinstance(mode, ast.Constant) and mode.value == "r")
            door = "rasters/files.py" if reading else "rasters/geotiff.py"
            assert relative == door, f"{relative}:{node.lineno} opens a raster; only {door} may"
        last = name.rpartition(".")[2]
        if last in {"open_rasterio", "MemoryFile"} or name == "gdal.Open":
            raise AssertionError(f"{relative}:{node.lineno} opens a raster by {name}")
        if last in {"to_raster", "write_cog", "cog_translate"} or name == "rasterio.shutil.copy":
            assert relative == "rasters/geotiff.py", f"{relative}:{node.lineno} writes a raster"


@each
def test_words_data_and_presentation_know_no_torch(path: Path) -> None:
    if room(path) in WORDS | DATA | {"present"}:
        heavy = {"torch", "torchvision", "timm", "open_clip", "lightning"}
        found = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))} & heavy
        assert not found


@each
def test_timm_and_open_clip_come_after_the_guard(path: Path) -> None:
    """Both import torchvision, which fails beside some builds of torch until models is imported."""
    if room(path) not in {"models", "learning"}:
        names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not names & {"torchvision", "timm", "open_clip", "lightning"}


LIGHT = {"__future__", "click", "speciesmap"}


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.name)
def test_commands_import_what_is_heavy_when_they_run(path: Path) -> None:
    import sys

    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            top, _, rest = name.partition(".")
            assert top in LIGHT or top in sys.stdlib_module_names, f"{path.name} imports {name}"
            if top == "speciesmap":
                assert rest.split(".")[0] in {"cli", "errors"}, f"{path.name} imports {name}"


def test_the_rules_look_at_something() -> None:
    assert {room(path) for path in FILES} >= {*WORDS, *DATA, "models", "mapping", "learning", "cli"}
    assert "rasters" in rooms_imported(ROOT / "learning" / "data.py")
    assert "outputs" in rooms_imported(ROOT / "atlas.py")
