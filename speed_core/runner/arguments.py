"""What the command line takes as text, as values: NAME=VALUE pairs, YAML, lists with commas. Bad text raises UserError."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from speed_core.files import UserError, read_text


class _Loader(yaml.SafeLoader):
    """YAML in which a text is a value of another type only where every reader expects it: true, 1 and 1e-5, but not `on` or `7e10`."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern in {
    "bool": "true|false|True|False",
    "null": "null|~|",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+][0-9]+",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def _finite(value: Any, option: str) -> Any:
    """`value`, unless a number in it is infinite or none: JSON and YAML read 1e999 as infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{option}: {value} is no number that can be used; write a finite one")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(part, option)
    return value


def overrides(items: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; VALUE is JSON, and text that is no JSON stays text."""
    out: dict[str, Any] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r}: no '='; write NAME=VALUE, for instance junior.epochs=2")
        try:
            out[name] = json.loads(value)
        except (ValueError, RecursionError):
            out[name] = {"True": True, "False": False, "None": None}.get(value, value)
        _finite(out[name], name)
    return out


def yaml_values(text: str, option: str) -> dict[str, Any]:
    """Parameters written as YAML or JSON; what is quoted is text. `option` is named where they cannot be read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return _finite(found, option)
    try:
        found = yaml.load(text, _Loader)
    except Exception as error:  # yaml's constructors raise many types
        raise UserError(f"{option}: {type(error).__name__}; give JSON or YAML, name: value") from None
    if not isinstance(found, dict):
        raise UserError(f"{option}: holds no name: value pairs; write one per line")
    if odd := [k for k in found if not isinstance(k, str)]:
        raise UserError(f"{option}: {odd[0]!r} is no name; write name: value")
    return _finite(found, option)


def yaml_file(path: Path) -> dict[str, Any]:
    """Parameters of a JSON or YAML file."""
    if not path.is_file():
        raise UserError(f"-f {path}: No such file or directory; give a JSON or YAML file of name: value")
    return yaml_values(read_text(path), f"-f {path}")


def grid(items: list[str] | None) -> dict[str, list[Any]]:
    """NAME=VALUE or NAME=VALUE,VALUE,...: the values of each name. A JSON list or a quoted text counts as one value."""
    out: dict[str, list[Any]] = {}
    for item in items or []:
        ((name, value),) = overrides([item]).items()
        written = item.partition("=")[2]
        many = isinstance(value, str) and value == written and "," in value  # text that is no JSON
        out[name] = [overrides([f"{name}={v.strip()}"])[name] for v in written.split(",")] if many else [value]
    return out


def words(text: str) -> list[str]:
    """The parts of a list with commas: "03, 04" gives ["03", "04"]."""
    return [t.strip() for t in text.split(",") if t.strip()]


def seeds(text: str) -> list[int]:
    """The whole numbers of a list with commas."""
    try:
        return [int(t) for t in words(text)]
    except ValueError:
        raise UserError(f"--seed {text!r}: not whole numbers; write 0 or 0,1,2") from None
