"""Configurations as files: YAML, checked before anything else runs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from speciesmap.config.sections import STAGES, AnyConfig, Config, Strict
from speciesmap.errors import ConfigError
from speciesmap.taxa import nearest

BRANCH = re.compile(rf"{'|'.join(STAGES)}|int|float|str|(constrained-|dict\[|list\[).*")
"""What pydantic adds to a key's path: the one of several types that it tried."""

MOST_VALUES = 100_000

_adapter: TypeAdapter[AnyConfig] = TypeAdapter(Config)


def load_config(source: Path | str | Mapping[str, Any], changes: Sequence[str] = ()) -> AnyConfig:
    """Read a training configuration.

    Args:
        source: A YAML file, the name of one that comes with speciesmap, such as `crisp` or
            `configs/crisp.yaml`, or the same as a mapping.
        changes: Assignments such as `optim.lr=0.001`; values are read as YAML.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown (the message names the
            nearest), or a value is out of range.

    >>> load_config("demo_crisp", ["optim.lr=0.01"]).optim.lr
    0.01
    """
    where = "the configuration" if isinstance(source, Mapping) else str(source)
    content: Any = dict(source) if isinstance(source, Mapping) else _read_yaml(Path(source))
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a mapping of keys to values; see configs/ for examples")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {change!r} is no assignment; write --set optim.lr=0.001")
        try:
            read = _plain(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(
                f"--set {change[:200]!r} has a value that is not readable YAML; quote it, or write "
                "--set optim.lr=0.001"
            ) from error
        _assign(content, key.split("."), read, change)
    try:
        return _adapter.validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error


def shipped_config(name: str) -> Path:
    """Path of a configuration that comes with speciesmap, by its name with or without `.yaml`.

    They lie in `configs/` of the repository and inside the installed package.

    Raises:
        ConfigError: There is none of that name; the message tells those there are.
    """
    here = Path(__file__).parent.parent
    folder = next(f for f in (here / "configs", here.parent / "configs") if f.is_dir())
    path = folder / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(
            f"{name} is no file, nor a configuration that comes with speciesmap: those are {known}"
        )
    return path


class _Plain(yaml.SafeLoader):
    """Plain values only, each key once, and not so many that a few lines fill the memory.

    An alias costs nothing until what it stands for is written out; nine aliases of nine aliases,
    ten times over, are three thousand million values.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice; keep one")
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(
                f"its aliases stand for more than {MOST_VALUES} values, or for themselves; write "
                "out what is meant"
            )
        return node


def _plain(text: str) -> Any:
    loader = _Plain(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _values(node: yaml.Node, counted: dict[int, float]) -> float:
    """How many values a node stands for with its aliases written out; infinite in a circle."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        counted[id(node)] = 1 + sum(_values(part, counted) for part in inner)
    return counted[id(node)]


def _read_yaml(path: Path) -> Any:
    try:
        if not path.is_file() and path.parent in (Path(), Path("configs")):
            path = shipped_config(path.name)
        return _plain(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error


def _assign(content: dict[str, Any], keys: Sequence[str], value: Any, change: str) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        section = content.get(key) or {}
        if not isinstance(section, dict):
            raise ConfigError(
                f"--set {change!r}: {'.'.join(keys[:depth])} is {section!r}, not a section with "
                "keys; set it as a whole"
            )
        content[key] = dict(section)
        content = content[key]
    if not keys[-1]:
        raise ConfigError(f"--set {change!r} names no key; write --set optim.lr=0.001")
    content[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, in words."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not BRANCH.fullmatch(str(part))]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"])
        close = nearest(path[-1], known, 1) or sorted(known)
        return f"unknown key {where!r}; did you mean {' or '.join(repr(c) for c in close[:8])}?"
    if first["type"] == "missing":
        return f"key {where!r} is missing; see configs/ for examples"
    if first["type"].startswith("union_tag"):
        got = first["input"].get("stage")
        return f"'stage' must be one of {', '.join(STAGES)}, got {got!r:.200}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{where} = {first['input']!r:.200}: {message}" if where else message


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """Keys known in the section where a location's last part was found."""
    section: Any = STAGES[str(location[0])]
    for part in location[1:-1]:
        annotation = section.model_fields[part].annotation
        options = [a for a in (annotation, *get_args(annotation)) if _is_section(a)]
        section = options[0]
    return list(section.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Strict)
