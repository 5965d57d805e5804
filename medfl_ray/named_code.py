"""Functions of a user's own, which a configuration names as 'module:function'."""

from __future__ import annotations

import importlib
from typing import Any

from medfl_ray.errors import ConfigError, MedflError


def named_function(name: str, setting: str, remedy: str, error: type[MedflError] = ConfigError) -> Any:
    """Import 'module:function' and return what is there.

    Args:
      setting: of the configuration, for the message.
      remedy: what to do where it cannot be imported.

    Raises:
      MedflError: of the kind `error`: there is no such module, or nothing of that name in it.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as problem:
        raise error(f"{setting} {name!r} cannot be imported ({type(problem).__name__}); {remedy}") from None
