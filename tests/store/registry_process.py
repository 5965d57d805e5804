"""A process that uses a registry as tests start it, and imports no torch.

Usage: registry_process.py ROOT DATABASE PACKAGE ACTION COUNT ACTOR, one printed line per completed step.
"""

import sys
from pathlib import Path

from model_registry import lineage

from medfl_ray.errors import RegistryError
from medfl_ray.store.registry.registry import Registry


def main(root: str, database: str, package: str, action: str, count: str, actor: str) -> None:
    registry = Registry(root, database or None)
    for _ in range(int(count)):
        if action in ("register", "both"):
            print(f"registered {registry.register('lesions', Path(package), lineage(), actor).version}", flush=True)
        if action in ("promote", "both"):
            change(registry, lambda: registry.promote("lesions", "candidate", actor), "promoted")
        if action in ("rollback", "both"):
            change(registry, lambda: registry.rollback("lesions", actor), "rolled back")
        if action == "fetch":
            registry.fetch(registry.get("lesions", 1), Path(root).parent / "fetched")
    assert "torch" not in sys.modules
    print("done", flush=True)


def change(registry: Registry, step, word: str) -> None:
    """Take a step that another process may have taken first; anything but that is an error."""
    try:
        step()
    except RegistryError as error:
        expected = ("champion already", "no version 'candidate'", "no earlier champion", "changed by somebody else")
        if not any(words in str(error) for words in (*expected, "was retired")):
            raise
        print("too late", flush=True)
    else:
        print(word, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
