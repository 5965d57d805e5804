"""Copies a run's rounds to MLflow while it runs, where the run names a tracking store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medfl_ray.config.run import RunConfig
from medfl_ray.federation.events import Event, Notice, RoundClosed

Emit = Callable[[Event], None]


def tracked(run: RunConfig, folder: Path, emit: Emit) -> Emit:
    """Return what also tells MLflow, where the run names its store.

    Raises:
      ConfigError: the store cannot be opened.
    """
    if run.output.mlflow is None:
        return emit
    from medfl_ray.store.run.mlflow_tracking import MlflowRun

    copy = MlflowRun(run, folder.name)

    def tell(event: Event) -> None:
        emit(event)
        if isinstance(event, RoundClosed) and copy.problem is None:
            copy.add_round(event.result)
            if copy.problem is not None:
                emit(Notice(message=f"note: {copy.problem}"))

    return tell
