"""The picture of a plan: `medfl-ray privacy plan --figure`."""

from __future__ import annotations

from pathlib import Path

from medfl_ray.analytics.plan_figure import FinishedRun, finished_runs, write_plan_figure
from medfl_ray.analytics.summary import Curve
from medfl_ray.cli.privacy_tables import Question, answer, curve_of, labels
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError, PrivacyConfigError

MAX_NAMED = 3


def draw_plan(path: Path, question: Question, runs: Path | None) -> None:
    """Draw the answer to a question, and say what was drawn."""
    _draw(path, {"plan": curve_of(answer(question))}, labels(question.delta), runs)


def draw_run_plan(path: Path, run: RunConfig, runs: Path | None) -> None:
    """Draw every hospital of a configuration that has differential privacy on, and say what was drawn."""
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.federation.planning import mechanisms, steps_of_run

    planned = mechanisms(run, list_hospitals(run))
    if not planned:
        raise PrivacyConfigError("no hospital of this configuration trains with a patient-level mechanism to draw")
    sharing: dict[Curve, list[str]] = {}
    for hospital, m in planned.items():
        # Of a schedule of steps the mean of a round, so that the curve ends where the run does.
        steps = -(-steps_of_run(run, m.num_steps) // run.federation.rounds)
        question = Question(None, m.delta, m.noise_multiplier, m.sample_rate, run.federation.rounds, steps)
        sharing.setdefault(curve_of(question), []).append(hospital)
    curves = {", ".join(h) if len(h) <= MAX_NAMED else f"{len(h)} hospitals": curve for curve, h in sharing.items()}
    deltas = sorted({m.delta for m in planned.values()})
    terms = labels(deltas[0])
    if len(deltas) > 1:
        terms = terms.replace(f"{deltas[0]:g}", f"{deltas[0]:g} to {deltas[-1]:g}")
    _draw(path, curves, terms, runs)


def _draw(path: Path, curves: dict[str, Curve], terms: str, folder: Path | None) -> None:
    points: list[FinishedRun] = []
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"--runs {folder.name!r} is not a folder; give the folder in which runs are kept")
        points = finished_runs(folder)
    write_plan_figure(path, curves, terms, points)
    print(f"drawn: {path.name}" + (f", with {len(points)} finished runs of {folder.name!r}" if folder else ""))
