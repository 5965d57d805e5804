"""A MONAI bundle as the model of a run: its network's definition and, where they can be expressed, its transforms.

A bundle's configuration can run any code, in `$` expressions and in `_target_`. Here it is read as data: nothing of it
is evaluated, and the network's definition goes into the run's own configuration. Built from it is only what
models/bundle_network.py allows.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from medfl_ray.errors import ConfigError

FILES = ("inference.json", "train.json", "inference.yaml", "train.yaml", "inference.yml", "train.yml")
NETWORK_KEYS = ("network_def", "network", "net")
TRANSFORM_KEYS = ("preprocessing", "train_preprocessing", "train#preprocessing", "validate#preprocessing")
HARMLESS = ("LoadImage", "EnsureChannelFirst", "EnsureType", "ToTensor", "CastToType")
"""Transforms that change no value and no grid that ours would not."""
MAX_DEPTH = 20
Section = dict[str, Any]


def with_bundle(raw: Section) -> Section:
    """Return a raw configuration with `model.bundle`, a folder, replaced by what the bundle says.

    What the configuration itself names wins over the bundle. The folder's path is not kept.

    Raises:
      ConfigError: the bundle cannot be read, or says what a run cannot do; the message says what to change.
    """
    model = raw.get("model")
    if not isinstance(model, dict) or "bundle" not in model:
        return raw
    if model.get("type", "bundle") != "bundle":
        raise ConfigError("model.bundle belongs to model.type: bundle; leave one of them out")
    documents = read_bundle(Path(str(model["bundle"])))
    network = network_of(documents)
    own = {key: value for key, value in model.items() if key != "bundle"}
    data = raw.get("data")
    found = transforms_of(documents) if isinstance(data, dict) else {}
    return {
        **raw,
        "model": {**shape_of(network), **own, "type": "bundle", "network": network},
        "data": {**found, **data} if isinstance(data, dict) else data,
    }


def read_bundle(bundle: Path) -> list[tuple[str, Section]]:
    """Return the configurations of a bundle with their files' names, that of inference first.

    Raises:
      ConfigError: there is none, or one cannot be read.
    """
    documents = []
    for name in FILES:
        file = bundle / "configs" / name
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            document = json.loads(text) if name.endswith("json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"configs/{name} of the bundle cannot be read ({type(error).__name__})") from None
        if isinstance(document, dict):
            documents.append((name, document))
    if not documents:
        raise ConfigError(
            f"model.bundle: {bundle.name!r} is no MONAI bundle: it has none of configs/{', configs/'.join(FILES[:4])}"
        )
    return documents


def network_of(documents: list[tuple[str, Section]]) -> Section:
    """Return the definition of the network, with every reference replaced by its value.

    Raises:
      ConfigError: there is no definition, or it holds an expression that is more than a plain value.
    """
    for name, document in documents:
        for key in NETWORK_KEYS:
            found = document.get(key)
            if isinstance(found, dict) and "_target_" in found:
                plain: Section = resolved(found, document, f"configs/{name}, {key}")
                return plain
    raise ConfigError(
        f"the bundle defines no network under {', '.join(NETWORK_KEYS)}; write its _target_ and arguments there"
    )


def resolved(value: Any, document: Section, where: str, depth: int = 0) -> Any:
    """Return a value with `@name` and `%name` replaced and `$` expressions read where they are plain literals.

    Raises:
      ConfigError: an expression would have to be evaluated, or a reference leads nowhere.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where} of the bundle refers to itself")
    if isinstance(value, dict):
        return {key: resolved(item, document, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, document, where, depth + 1) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        return _literal(value[1:], where)
    if isinstance(value, str) and value[:1] in ("@", "%"):
        return resolved(_lookup(value[1:], document, where), document, where, depth + 1)
    return value


def _literal(text: str, where: str) -> Any:
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(
            f"{where} of the bundle is the expression ${text}, which would have to be evaluated; a bundle is read as "
            "data here: write the value in its place"
        ) from None
    return list(found) if isinstance(found, tuple) else found


def _lookup(name: str, document: Section, where: str) -> Any:
    found: Any = document
    for part in name.replace("#", "::").split("::"):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ConfigError(f"{where} of the bundle refers to {name!r}, which its configuration lacks") from None
    return found


def shape_of(network: Mapping[str, Any]) -> Section:
    """Return what the definition says of the model section: dimensions, channels and what input edges must fit."""
    names = {"spatial_dims": "spatial_dims", "in_channels": "in_channels", "out_channels": "out_channels"}
    found = {ours: network[theirs] for theirs, ours in names.items() if isinstance(network.get(theirs), int)}
    strides = network.get("strides")
    if isinstance(strides, list) and all(isinstance(stride, int) for stride in strides):
        found["size_divisor"] = math.prod(strides)
    return found


def transforms_of(documents: list[tuple[str, Section]]) -> Section:
    """Return the bundle's preparation of an image as fields of the data section.

    Raises:
      ConfigError: a transform is one that data.spacing_mm, data.intensity and data.window cannot express.
    """
    for name, document in documents:
        for key in TRANSFORM_KEYS:
            try:
                steps = _lookup(key, document, key)
            except ConfigError:
                continue
            steps = steps.get("transforms", []) if isinstance(steps, dict) else steps
            return _fields_of(resolved(steps, document, f"configs/{name}, {key}"))
    return {}


def _fields_of(steps: Any) -> Section:
    fields: Section = {"intensity": "none"}
    for step in steps if isinstance(steps, list) else []:
        target = str(step.get("_target_", "")) if isinstance(step, dict) else ""
        kind = target.rpartition(".")[2]
        kind = kind[:-1] if kind.endswith("d") else kind.removesuffix("Dict")
        fields |= _field_of(kind, step)
    return fields


def _field_of(kind: str, step: Section) -> Section:
    given = {key: value for key, value in step.items() if key not in ("_target_", "keys", "mode", "allow_missing_keys")}
    if kind in HARMLESS or (kind == "Orientation" and given.get("axcodes") == "RAS"):
        return {}
    if kind == "Spacing":
        return {"spacing_mm": given.get("pixdim")}
    if kind == "NormalizeIntensity" and given.get("channel_wise") is True and not given.get("nonzero"):
        return {"intensity": "zscore"}
    unit = (given.get("b_min"), given.get("b_max"), given.get("clip")) == (0.0, 1.0, True)
    if kind == "ScaleIntensityRange" and unit:
        return {"intensity": "window", "window": [given.get("a_min"), given.get("a_max")]}
    percentiles = (given.get("lower"), given.get("upper"), given.get("channel_wise")) == (1, 99, True)
    if kind == "ScaleIntensityRangePercentiles" and unit and percentiles:
        return {"intensity": "percentile"}
    raise ConfigError(
        f"the bundle prepares images with {kind} {given}, which data.spacing_mm, data.intensity and data.window cannot "
        "express. Take the transform out of a copy of the bundle and prepare the images in this way beforehand, or "
        "use the bundle's network alone by naming another preparation in a copy of it"
    )
