"""torchvision imports beside any torch build, and nothing changes where it is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GUARD = Path(__file__).parent.parent / "speciesmap" / "models" / "torchvision_guard.py"


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_timm_and_open_clip_import_after_speciesmap() -> None:
    code = "import speciesmap.models, torchvision.transforms, timm, open_clip; print('fine')"
    done = python(code)
    assert done.stdout == "fine\n", done.stderr
    assert "torchvision" not in done.stderr


FAKES = """
import importlib, logging, pathlib, runpy, sys
import torch
guard, folder = sys.argv[1], pathlib.Path(sys.argv[2])
package = folder / "torchvision"
package.mkdir()
sys.path.insert(0, str(folder))
declared, records = [], []
torch.library.define = lambda name, schema: declared.append(name)
handler = logging.Handler()
handler.emit = records.append
log = logging.getLogger("speciesmap")
log.addHandler(handler)
log.setLevel(logging.DEBUG)

def run(source):
    (package / "__init__.py").write_text(source)
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    declared.clear(), records.clear()
    runpy.run_path(guard)

run("whole = True")
assert not declared and not records, "whole: nothing is declared, nothing is said"

try:
    run("raise RuntimeError('out of cheese')")
except RuntimeError as error:
    assert "cheese" in str(error) and not declared
else:
    raise AssertionError("another failure passes through")

pathlib.Path(folder / "flag").touch()
run(
    "import pathlib\\n"
    "flag = pathlib.Path(__file__).parent.parent / 'flag'\\n"
    "if flag.exists():\\n"
    "    flag.unlink()\\n"
    "    raise RuntimeError('operator torchvision::nms does not exist')\\n"
)
assert sorted(declared) == ["torchvision::nms", "torchvision::qnms"], declared
assert "torchvision" in sys.modules
assert [record.levelname for record in records] == ["DEBUG"], records
print("fine")
"""


def test_it_acts_only_where_the_operators_are_missing_and_says_so_at_debug(tmp_path: Path) -> None:
    done = python(FAKES, GUARD, tmp_path)
    assert done.stdout == "fine\n", done.stderr
