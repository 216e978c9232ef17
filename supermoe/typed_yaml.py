"""Typed YAML: the base class of every config, the seats that components plug into, and the loader.

Nothing here knows what supermoe does; `supermoe/config.py` declares what a run can be told.
"""

from __future__ import annotations

import datetime as dt
import difflib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema


class UserError(ValueError):
    """Something the user can mend: the message names the place and the remedy; commands exit with code 2."""


class Config(BaseModel):
    """Base of every config section: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


# --- scalar types -----------------------------------------------------------------------------------------------------

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
ALL_TIME = 1 << 60  # seconds; the length of the window `all`


def parse_duration(value: Any) -> int:
    """'28d', '12h', '90s', 'all' or a number of seconds -> seconds."""
    if isinstance(value, bool):
        raise ValueError("expected a duration such as 28d, 12h or all")
    if isinstance(value, int) and value > 0:
        return value
    if value == "all":
        return ALL_TIME
    match = re.fullmatch(r"(\d+)\s*([smhdw])", str(value).strip())
    if not match or int(match[1]) == 0:
        raise ValueError(f"expected a duration such as 28d, 12h or all, got {value!r}")
    return int(match[1]) * _UNITS[match[2]]


def format_duration(seconds: int) -> str:
    """Seconds -> the shortest text that `parse_duration` reads back."""
    if seconds == ALL_TIME:
        return "all"
    unit = next(u for u in ("d", "h", "m", "s") if seconds % _UNITS[u] == 0)
    return f"{seconds // _UNITS[unit]}{unit}"


def parse_instant(value: Any) -> int:
    """An ISO date or time (UTC unless it carries a zone) or epoch seconds -> int64 seconds UTC."""
    if isinstance(value, bool):
        raise ValueError("expected a date such as 2017-11-05")
    if isinstance(value, int):
        return value
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(f"expected a date such as 2017-11-05 or 2017-11-05T12:00:00, got {value!r}") from None
    if not isinstance(value, dt.datetime):
        raise ValueError(f"expected a date such as 2017-11-05, got {value!r}")
    return int((value if value.tzinfo else value.replace(tzinfo=dt.UTC)).timestamp())


def format_instant(seconds: int) -> str:
    """Seconds UTC -> ISO date, with the time of day where it is not midnight."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.strftime("%Y-%m-%d" if seconds % 86400 == 0 else "%Y-%m-%dT%H:%M:%S")


_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]})
Duration = Annotated[int, BeforeValidator(parse_duration), PlainSerializer(format_duration), _SCHEMA]
Instant = Annotated[int, BeforeValidator(parse_instant), PlainSerializer(format_instant), _SCHEMA]


# --- seats: where a component of the user's choice sits ---------------------------------------------------------------


def nearest(word: str, choices: Any) -> str:
    """', did you mean x?' for the closest choice, else the list of choices."""
    names = sorted(map(str, choices))
    if not names:
        return "there is none at all"
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(names)}"


def resolve(module: str, name: str) -> type:
    """The class called `name` in `module.REGISTRY`, or the one at the import path `package.module:Class`."""
    if ":" in name:
        path, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import '{name}': {error}") from None
    registry = importlib.import_module(module).REGISTRY
    if name not in registry:
        raise ValueError(f"unknown type '{name}', {nearest(name, registry)}")
    return registry[name]


def build(module: str, config: Any, **runtime: Any) -> Any:
    """Make the component that `config.type` names: `Class(config, **runtime)`."""
    return resolve(module, config.type)(config, **runtime)


class Seat:
    """Annotation of a config value `{type: name, ...}`, which the class named by `type` validates with its `Config`.

    A `usual` type need not be named.
    """

    def __init__(self, module: str, usual: str | None = None):
        self.module, self.usual = module, usual

    @property
    def wanted(self) -> str:
        """What to write here."""
        names = ", ".join(sorted(importlib.import_module(self.module).REGISTRY))
        return f"a mapping with a key 'type', one of: {names}, or package.module:Class"

    def _validate(self, value: Any) -> Config:
        if isinstance(value, Config):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if isinstance(value, Mapping) and self.usual:
            value = {"type": self.usual, **value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            raise ValueError(f"expected {self.wanted}")
        cls: Any = resolve(self.module, value["type"])
        return validate_inside(cls.Config, value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        dump_json = core_schema.plain_serializer_function_ser_schema(lambda config: config.model_dump(mode="json"))
        return core_schema.no_info_plain_validator_function(self._validate, serialization=dump_json)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        options = []
        for name, cls in sorted(importlib.import_module(self.module).REGISTRY.items()):
            option = handler(cls.Config.__pydantic_core_schema__)
            handler.resolve_ref_schema(option)["properties"]["type"] = {"const": name}
            options.append(option)
        return {"anyOf": [{"type": "string"}, *options]}


# --- reading ----------------------------------------------------------------------------------------------------------


def problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """(full key, what is wrong and how to mend it) for every line of a pydantic error."""
    found = []
    for line in error.errors():
        key = ".".join(str(part) for part in line["loc"])
        if line["type"] == "nested":
            found += [(f"{key}.{inner}" if inner else key, text) for inner, text in line["ctx"]["problems"]]
        elif line["type"] == "extra_forbidden":
            found.append((key, f"unknown key, {nearest(str(line['loc'][-1]), _siblings(model, line['loc'][:-1]))}"))
        elif line["type"] == "missing":
            found.append((key, f"is required{_choices(model, line['loc'])}"))
        else:
            text = line["msg"].removeprefix("Value error, ")
            is_told = "got" in text or isinstance(line["input"], Mapping)
            found.append((key, text if is_told else f"{text} (got {line['input']!r:.80})"))
    return found


def validate_inside(model: type[Config], raw: Mapping) -> Any:
    """Raw mapping -> config, called by the validator of a key that holds it; the key stands before each wrong one."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        raise PydanticCustomError("nested", "invalid", {"problems": problems(error, model)}) from None


def _choices(model: Any, path: tuple) -> str:
    """What may sit at `path` inside `model`, where that is a seat."""
    field = getattr(_model_at(model, path[:-1]), "model_fields", {}).get(path[-1])
    seats = [seat for seat in getattr(field, "metadata", ()) if isinstance(seat, Seat)]
    return f"; give {seats[0].wanted}" if seats else ""


def _siblings(model: Any, path: tuple) -> list[str]:
    """Names of the keys allowed at `path` inside `model`."""
    return list(getattr(_model_at(model, path), "model_fields", {}))


def _model_at(model: Any, path: tuple) -> Any:
    """The config class at `path` inside `model`."""
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        annotation = field.annotation if field else None
        if annotation is None:  # inside a dict: look at its values
            continue
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        candidates += [a for c in candidates for a in getattr(c, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, reads 1e-3 as a number, and leaves 2017-13-01 to the check of its key."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key '{key}' given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _timestamp(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        return loader.construct_yaml_timestamp(node)
    except ValueError:
        return node.value


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _timestamp)
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML; errors name file, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise UserError(f"{place}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None


def _read_file(path: Path, chain: tuple[Path, ...] = ()) -> dict:
    if path.resolve() in chain:
        raise UserError(f"{path}: `extends` goes in a circle: {' -> '.join(str(p) for p in (*chain, path.resolve()))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {getattr(error, 'strerror', None) or error}") from None
    raw = read_yaml(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: the top level of a config must be a mapping of keys, got {type(raw).__name__}")
    base = raw.pop("extends", None)
    return merge(_read_file(path.parent / base, (*chain, path.resolve())), raw) if base else raw


def merge(base: dict, update: dict) -> dict:
    """`update` laid over `base`; mappings are merged unless the new one names another `type`."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(old, dict) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = merge(old, value)
    return merged


def apply_override(raw: dict, text: str) -> dict:
    """Lay one command line override `a.b=value` (value in YAML) over the raw mapping."""
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"override '{text}' is not of the form key.subkey=value")
    update: Any = read_yaml(value, f"override '{text}'")
    for part in reversed(parts):
        update = {part: update}
    return merge(raw, update)


def validate(model: type[Config], raw: dict, where: str) -> Any:
    """Raw mapping -> config, or one error that lists every wrong key with its remedy."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"{key or 'top level'}: {text}" for key, text in problems(error, model)]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def load(model: type[Config], path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """Read a YAML file with its `extends` chain, apply overrides, validate against `model`."""
    raw = _read_file(Path(path))
    for text in overrides:
        raw = apply_override(raw, text)
    return validate(model, raw, str(path))


def dump(config: Config) -> str:
    """The resolved config as YAML that loads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
