"""The text of pipelines.yaml, as the values that YAML 1.2 gives: what DVC and Prefect will read from it, too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

FILE = Path("pipelines.yaml")
MOST_VALUES = 100_000
"""An alias costs nothing here, but DVC writes it out: ten lines can stand for more values than there is memory."""
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class SettingsError(ValueError):
    """pipelines.yaml is not valid; the message lists every fault."""


def read(path: Path) -> dict[str, Any]:
    """The sections of a settings file. Raises SettingsError."""
    # YAML 1.2, as DVC reads it: 2e-4 is a number, a repeated key is an error
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    try:
        raw = YAML(typ="safe", pure=True).load(_decode(path))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SettingsError(f"{path}: not valid YAML: {where}{_line(error.problem or error.context)}") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deep to be settings; look for a repeated [ or {{") from None
    except SettingsError:
        raise
    except Exception as error:  # a date of a 13th month, a number too long: the parser lets Python's own errors pass
        raise SettingsError(f"{path}: not valid YAML: {_line(error)}") from None
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"is a {type(raw).__name__}"
        raise SettingsError(f"{path}: {what}; it must hold the sections models, corpora, pipelines and deployments")
    if (values := _values(raw, above=frozenset(), known={})) > MOST_VALUES:
        count = "values without end" if values == math.inf else f"{values:.0e} values"
        raise SettingsError(f"{path}: its aliases (*name) stand for {count}; allowed are {MOST_VALUES:,}")
    return raw


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(f"{path}: not found; run from the project's root, where pipelines.yaml lies") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = next((name for start, name in WIDE.items() if content.startswith(start)), None)
        line = content.count(b"\n", 0, error.start) + 1
        what = f"it is {wide}" if wide else f"byte 0x{content[error.start]:02x} in line {line}"
        source = wide or "LATIN1"
        raise SettingsError(
            f"{path}: not UTF-8 ({what}); save it as UTF-8, such as by `iconv -f {source} -t UTF-8`"
        ) from None


def _values(value: Any, *, above: frozenset[int], known: dict[int, float]) -> float:
    """How many values there are with aliases written out; infinite if one stands for what holds it."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in above:
        return math.inf
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1.0 + sum(_values(each, above=above | {id(value)}, known=known) for each in inner)
    return known[id(value)]


def _line(what: object) -> str:
    return " ".join(str(what).split())
