"""YAML at the edge: load, override, check and write a run configuration."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from medfl_ray.config.bundle import with_bundle
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def load_run_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Load a run's YAML file and apply `section.key=value` overrides.

    Raises:
      ConfigError: the file is missing or not YAML, a key is unknown (the nearest name is given) or a value is
        out of range.
    """
    raw = read_yaml(Path(path))
    for override in overrides:
        apply_override(raw, override)
    return parse_run_config(with_bundle(raw), source=Path(path).name)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, or say in one sentence why it cannot be read."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration file {path.name!r} in the folder {path.parent.name or '.'!r}; check the path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path.name!r}: {type(error).__name__}; expected a readable UTF-8 YAML file"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path.name!r} is not valid YAML{where}: {_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path.name!r} is nested too deeply; expected sections of a few levels") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path.name!r} holds {type(raw).__name__}; expected a mapping with sections such as data and model"
        )
    return raw


def _problem(error: yaml.YAMLError) -> str:
    """The first line of what the parser says; the rest quotes the file."""
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in a nested mapping, in place; the value is read as YAML.

    Raises:
      ConfigError: the override is not of the form key=value, or passes through something that is not a section.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"override {override!r} is not of the form section.key=value, for instance federation.rounds=5"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of override {key!r} is not valid YAML; quote it") from None
    for part in parts[:-1]:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {key!r} passes through {part!r}, which is a value and not a section")
    raw[parts[-1]] = value


def parse_run_config(raw: dict[str, Any], source: str = "the configuration") -> RunConfig:
    """Check a raw mapping against the schema.

    Raises:
      ConfigError: one line per problem, each with its place and what is expected.
    """
    return parse_model(RunConfig, raw, source)


def parse_model(model: type[M], raw: dict[str, Any], source: str) -> M:
    """Build any of our frozen models from a mapping, with plain messages."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [_sentence(model, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def _sentence(model: type[BaseModel], problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place!r}{_nearest(model, problem['loc'])}"
    if problem["type"] == "missing":
        return f"{place!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{place}: {message} (found {_short(problem['input'])})"
        if problem["loc"] and problem["type"] != "value_error"
        else message
    )


def _short(value: Any) -> str:
    """A value as it was read, cut before aliases in a YAML file can multiply it."""
    shape = reprlib.Repr()
    shape.maxlevel, shape.maxstring, shape.maxother = 2, 60, 60
    return shape.repr(value)


def _nearest(model: type[BaseModel], place: tuple[str | int, ...]) -> str:
    current = model
    for part in place[:-1]:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        annotation = getattr(field, "annotation", None)
        options = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if inner is None:
            return ""
        current = inner
    close = difflib.get_close_matches(str(place[-1]), list(current.model_fields), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(current.model_fields)}"


def dump_yaml(config: BaseModel) -> str:
    """Return a configuration as YAML text, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
