"""Write docs/reference/config.md and cli.md from the schema and the command line; `make reference` runs it."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel

from medfl_ray.cli.main import app
from medfl_ray.config.run import FIELD_ALIASES, SECTION_ALIASES, RunConfig
from medfl_ray.config.site import SiteConfig
from medfl_ray.config.strategies import STRATEGIES

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/gen_reference.py; edit the source, then run `make reference`. -->\n"
STRATEGY_PAGE = Path(__file__).parent / "strategies.md"
TABLE_BEGINS = "<!-- Written by docs/gen_reference.py from the traits. -->\n"
TABLE_ENDS = "<!-- End of the traits. -->\n"
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def main() -> None:
    """Write both pages, and the table of the strategies' traits into theirs."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
    before, _, rest = STRATEGY_PAGE.read_text(encoding="utf-8").partition(TABLE_BEGINS)
    after = rest.partition(TABLE_ENDS)[2]
    STRATEGY_PAGE.write_text(f"{before}{TABLE_BEGINS}\n{traits_table()}\n{TABLE_ENDS}{after}", encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the text of each generated page by file name."""
    return {"config.md": config_page(), "cli.md": cli_page()}


def traits_table() -> str:
    """Return which strategy goes with what, one row each."""
    columns = ("patient-level DP", "hospital-level DP", "robust mode", "late updates", "fewer hospitals", "ClientAlgo")
    lines = [f"| `strategy` | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, traits in STRATEGIES.items():
        allowed = (
            traits.patient_dp_ok and not traits.sends_loss,
            traits.hospital_level_dp_ok and not traits.sends_loss,
            traits.robust_ok,
            traits.sum_suffices and not traits.tied_to_its_round,
            traits.coalitions_ok,
            traits.client_algo_ok,
        )
        lines.append(f"| `{name}` | {' | '.join('yes' if one else 'no' for one in allowed)} |")
    return "\n".join(lines) + "\n"


def config_page() -> str:
    """Describe every field of a run's and of a hospital's configuration."""
    parts = [
        "# Configuration",
        GENERATED,
        "Unknown keys are refused, with the nearest known name. A field is set on the command line with "
        "`--set section.field=value`. Epsilon is always patient-level, (epsilon, delta), add/remove adjacency.",
        "## A run",
        "The YAML file that `medfl-ray run` takes.",
        *_sections(RunConfig, "", 3),
        "### Other names",
        "These names, from the REST and SDK calls, are accepted too:",
        _aliases(),
        "## A hospital",
        "`hospital_config.yaml`, the hospital's own file; its policy wins over whatever a run asks for.",
        *_sections(SiteConfig, "", 3),
    ]
    return "\n\n".join(parts) + "\n"


def _aliases() -> str:
    rows = [f"| `{alias}` | `{name}` |" for alias, name in SECTION_ALIASES.items()]
    rows += [
        f"| `{section}.{alias}` | `{section}.{name}` |"
        for section, aliases in FIELD_ALIASES.items()
        for alias, name in aliases.items()
    ]
    return "\n".join(["| also | means |", "|---|---|", *rows])


def _sections(model: type[BaseModel], place: str, level: int) -> Iterator[str]:
    schema = model.model_json_schema()["properties"]
    fields = {name: _nested(field.annotation) for name, field in model.model_fields.items()}
    rows = []
    for name, field in model.model_fields.items():
        kind = "section" if fields[name] else _kind(schema[name])
        default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
        default = "" if fields[name] and default != "required" else default
        rows.append(f"| `{place}{name}` | {kind} | {default} | {field.description or ''} |")
    yield "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])
    for name, inner in fields.items():
        if inner is not None:
            yield f"{'#' * level} {place}{name}"
            yield _first_line(inner.__doc__)
            yield from _sections(inner, f"{place}{name}.", min(level + 1, 5))


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        found = [_nested(argument) for argument in get_args(annotation)]
        return next((model for model in found if model is not None), None)
    return None


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = [_kind(option) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        inner = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
        return f"list of {_kind(inner)}" if inner else "list"
    if schema.get("type") == "object":
        return "mapping"
    limits = " ".join(f"{sign} {schema[key]:g}" for key, sign in LIMITS.items() if key in schema)
    return f"{schema.get('type', 'any')} {limits}".strip()


def _value(value: Any) -> str:
    if value is None or value in ((), {}, ""):
        return ""
    text = str(value) if isinstance(value, Path) else json.dumps(value, default=str)
    return f"`{text}`"


def cli_page() -> str:
    """Describe every command with its arguments and options."""
    parts = ["# Command line", GENERATED, "Exit codes: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."]
    for path, command in commands():
        parts += [f"## {path}", command.help or "", _parameters(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command that does something, with its full name."""
    yield from _walk("medfl-ray", typer.main.get_command(app))


def _walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _walk(f"{path} {name}", inner)


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        argument = parameter.param_type_name == "argument"
        names = [parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
        default = "" if parameter.default in (None, (), []) else _value(_plain(parameter.default))
        shown = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {shown} | {default or ('required' if parameter.required else '')} | {parameter.help or ''} |")
    return "\n".join(["| | default | meaning |", "|---|---|---|", *rows]) if rows else ""


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
