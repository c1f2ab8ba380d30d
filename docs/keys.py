"""Write docs/configuration.md from the sections of `speciesmap.config`: `python docs/keys.py`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from speciesmap.config import STAGES

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """# Configurations

`speciesmap train CONFIG.yaml` reads a file of these keys, and `--set optim.lr=0.001` sets one on
the command line. Those [that come with speciesmap](../configs) go by name: `speciesmap train
crisp`. A key that is not known is refused, and the nearest one named.
"""
KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "over {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "under {}",
    "multipleOf": "a multiple of {}",
    "minItems": "at least {}",
}


def page() -> str:
    """The whole page, in Markdown: stages first, then each section where a stage first has it."""
    stages = [model.__name__ for model in STAGES.values()]
    _, schema = models_json_schema([(model, "validation") for model in STAGES.values()])
    sections: dict[str, Any] = schema["$defs"]
    titles = {model.__name__: f"stage: {stage}" for stage, model in STAGES.items()}
    for stage in stages:
        titles |= {name: path for path, name in inner(stage, sections) if name not in titles}
    parts = [INTRODUCTION]
    for name, title in titles.items():
        parts += [f"## {title}\n", inspect.cleandoc(sections[name]["description"]), ""]
        parts += [*table(sections[name], titles), ""]
    return "\n".join(parts)


def inner(name: str, sections: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Sections inside of one, by the path of keys that leads there."""
    for key, value in sections[name]["properties"].items():
        for option in value.get("anyOf", [value]):
            if "$ref" in option:
                found = option["$ref"].rpartition("/")[2]
                yield f"{path}{key}", found
                yield from inner(found, sections, f"{path}{key}.")


def table(section: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """A section's keys: what they may be, and what they are by default."""
    yield "| key | may be | default |\n|---|---|---|"
    for key, value in section["properties"].items():
        options = [kind(o, titles) for o in value.get("anyOf", [value]) if o.get("type") != "null"]
        default = "must be given"
        if key not in section.get("required", ()):  # a section that is left out has its own
            default = "" if "$ref" in value else shown(value["default"])
        yield f"| `{key}` | {' or '.join(options)} | {default} |"


def kind(value: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """What a value may be, in words."""
    if "$ref" in value:
        title = titles[value["$ref"].rpartition("/")[2]]
        return f"[section](#{title.replace('.', '').lower()})"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    bounds = ", ".join(told.format(value[key]) for key, told in BOUNDS.items() if key in value)
    if value["type"] == "array":
        return f"list of {kind(value['items'], titles)}" + f" ({bounds})" * bool(bounds)
    if value["type"] == "object":
        each = value.get("additionalProperties")
        return "mapping" + (f" of names to {kind(each, titles)}" if isinstance(each, dict) else "")
    return KINDS[value["type"]] + f", {bounds}" * bool(bounds)


def shown(default: Any) -> str:
    """A default as it would stand in the file."""
    if default is None:
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
