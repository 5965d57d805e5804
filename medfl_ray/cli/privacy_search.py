"""What a finished search says about epsilon: `medfl-ray privacy plan --search FOLDER --dice X`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from medfl_ray.analytics.search_summary import up
from medfl_ray.cli.privacy_tables import labels
from medfl_ray.errors import PrivacyConfigError


def print_needed(search: Path, dice: float, others: Sequence[object]) -> None:
    """Say what epsilon a Dice needs by a search's finished trials, and which trial shows it.

    Raises:
      PrivacyConfigError: other figures of a plan are given as well, or the Dice is none.
      ConfigError: the folder is not a search's, or no trial has finished.
    """
    from tune.report import epsilon_needed

    if any(value is not None for value in others):
        raise PrivacyConfigError("--search and --dice stand alone; leave the other figures of the plan out")
    if not 0 < dice <= 1:
        raise PrivacyConfigError(f"--dice is {dice:g}; a Dice lies above 0 and is at most 1")
    answer = epsilon_needed(search, dice)
    terms, measured = labels(answer.delta), f"by {answer.num_trials} finished trials on {answer.judged_on}"
    if answer.epsilon is None or answer.nearest is None:
        best = answer.best
        typer.echo(
            f"for Dice >= {dice:g} no trial is enough: the best one, {best.number}, reached {best.dice:.3f} at epsilon "
            f"{up(best.epsilon)} ({terms}), {measured}"
        )
        return
    most = "at most" if answer.smallest_tried else "about"
    near = answer.nearest
    typer.echo(f"for Dice >= {dice:g} you need epsilon {most} {up(answer.epsilon)} ({terms}), {measured}")
    typer.echo(
        f"trial {near.number} reached Dice {near.dice:.3f} (95 % interval over patients {near.low:.3f} to "
        f"{near.high:.3f}) at epsilon {up(near.epsilon)}"
    )
