"""medfl-ray privacy: plan and estimate what a run costs, and read hospitals' ledgers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medfl_ray.cli import privacy_ledger
from medfl_ray.cli.privacy_audit import audit
from medfl_ray.errors import PrivacyConfigError

app = typer.Typer(no_args_is_help=True)
app.command()(audit)
app.add_typer(privacy_ledger.app, name="ledger", help="Show, verify and recover privacy ledgers.")

Epsilon = Annotated[float | None, typer.Option(help="Patient-level epsilon of the whole run.")]
Delta = Annotated[float | None, typer.Option(help="Delta; min(1e-5, 1 / (10 num_patients)) when absent.")]
Sigma = Annotated[float | None, typer.Option("--noise-multiplier", help="Noise standard deviation over the clip norm.")]
Rate = Annotated[float | None, typer.Option(help="Poisson rate q of a patient per step.")]
Patients = Annotated[int | None, typer.Option(help="Public, rounded number of training patients of the hospital.")]
Batch = Annotated[float | None, typer.Option(help="Expected patients per step; gives q with --num-patients.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds.")]
Steps = Annotated[int | None, typer.Option("--steps-per-round", help="Local steps per round.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override of the configuration, section.key=value.")]
FigureFile = Annotated[
    Path | None, typer.Option("--figure", help="Draw epsilon over rounds into this .png, .svg or .pdf file.")
]
Runs = Annotated[
    Path | None, typer.Option("--runs", help="Folder of finished runs; their score against epsilon joins the figure.")
]
SearchFolder = Annotated[
    Path | None, typer.Option("--search", help="Folder of a finished search: say what epsilon a Dice needs by it.")
]
Dice = Annotated[float | None, typer.Option("--dice", help="With --search: the Dice that is to be reached.")]
Config = Annotated[Path | None, typer.Argument(help="YAML file of a run: plan each of its hospitals.")]


@app.command()
def plan(
    config: Config = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    noise_multiplier: Sigma = None,
    sample_rate: Rate = None,
    num_patients: Patients = None,
    batch_size: Batch = None,
    rounds: Rounds = None,
    steps_per_round: Steps = 1,
    set_: Set = None,
    figure: FigureFile = None,
    runs: Runs = None,
    search: SearchFolder = None,
    dice: Dice = None,
) -> None:
    """Solve the one that is left out of epsilon, noise multiplier, sample rate and rounds; or plan a run's file.

    With --search and --dice it says what epsilon that Dice needs.
    """
    from medfl_ray.cli import privacy_figure, privacy_search, privacy_tables

    if (search is None) != (dice is None):
        raise PrivacyConfigError("--search and --dice belong together: a search's folder and the Dice to be reached")
    if search is not None and dice is not None:
        privacy_search.print_needed(search, dice, [config, epsilon, noise_multiplier, sample_rate, rounds, figure])
        return
    if runs is not None and figure is None:
        raise PrivacyConfigError("--runs adds finished runs to the figure; give --figure FILE as well")
    if config is not None:
        from medfl_ray.config.files import load_run_config

        if any(value is not None for value in (epsilon, noise_multiplier, sample_rate, rounds, batch_size)):
            raise PrivacyConfigError("give either a configuration (and --set) or the figures themselves, not both")
        run = load_run_config(config, tuple(set_ or ()))
        privacy_tables.print_run_plan(run)
        if figure is not None:
            privacy_figure.draw_run_plan(figure, run, runs)
        return
    question = privacy_tables.Question(
        epsilon=epsilon,
        delta=_delta(delta, num_patients),
        noise_multiplier=noise_multiplier,
        sample_rate=_rate(sample_rate, batch_size, num_patients),
        rounds=rounds,
        steps_per_round=steps_per_round or 1,
    )
    privacy_tables.print_plan(question)
    if figure is not None:
        privacy_figure.draw_plan(figure, question, runs)


@app.command()
def estimate(
    noise_multiplier: Sigma = None,
    rounds: Rounds = None,
    steps_per_round: Steps = None,
    num_patients: Patients = None,
    batch_size: Batch = None,
    sample_rate: Rate = None,
    delta: Delta = None,
) -> None:
    """Say what a run would cost one hospital's patients."""
    from medfl_ray.cli import privacy_tables

    rate = _rate(sample_rate, batch_size, num_patients)
    needed = {
        "--noise-multiplier": noise_multiplier,
        "--rounds": rounds,
        "--steps-per-round": steps_per_round,
        "--sample-rate (or --batch-size and --num-patients)": rate,
        "--delta (or --num-patients)": delta or num_patients,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing or rate is None or noise_multiplier is None or rounds is None or steps_per_round is None:
        raise PrivacyConfigError(f"a patient-level epsilon cannot be computed without {', '.join(missing)}")
    privacy_tables.print_plan(
        privacy_tables.Question(
            epsilon=None,
            delta=_delta(delta, num_patients),
            noise_multiplier=noise_multiplier,
            sample_rate=rate,
            rounds=rounds,
            steps_per_round=steps_per_round,
        )
    )


def _delta(delta: float | None, num_patients: int | None) -> float:
    from medfl_ray.config.site import default_delta

    if delta is not None:
        if num_patients is not None and delta >= 1 / num_patients:
            raise PrivacyConfigError(f"delta={delta:g} is not below 1 / num_patients = {1 / num_patients:g}; lower it")
        return delta
    if num_patients is None:
        raise PrivacyConfigError("an epsilon says nothing without its delta; give --delta or --num-patients")
    return default_delta(num_patients)


def _rate(sample_rate: float | None, batch_size: float | None, num_patients: int | None) -> float | None:
    if sample_rate is not None:
        return sample_rate
    if batch_size is None:
        return None
    if num_patients is None:
        raise PrivacyConfigError("--batch-size gives a sample rate only together with --num-patients")
    return min(1.0, batch_size / num_patients)
