"""The schema of a search: what varies between which bounds, and how trials are drawn, stopped and accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config.base import Positive, PositiveFloat, Section
from medfl_ray.config.evaluation import EvaluationConfig
from medfl_ray.config.files import apply_override, parse_run_config, read_yaml
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = float | int | str
Parameters = Mapping[str, Value]


class FloatRange(Section):
    """Any number between two bounds."""

    low: PositiveFloat = Field(description="Smallest value.")
    high: PositiveFloat = Field(description="Largest value.")
    log: bool = Field(True, description="Draw the logarithm evenly, so that each factor of ten is as likely.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be the smaller one")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.low, self.high

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna takes it."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)


class IntRange(Section):
    """Any whole number between two bounds, both included."""

    low: Positive = Field(description="Smallest value.")
    high: Positive = Field(description="Largest value.")
    log: bool = Field(False, description="Draw the logarithm evenly.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be the smaller one")
        return self

    @property
    def values(self) -> tuple[int, ...]:
        """Every value."""
        return tuple(range(self.low, self.high + 1))

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna takes it."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log)


class Strategies(Section):
    """Some of the aggregation strategies."""

    choices: Annotated[tuple[Literal["fedavg", "fedadam"], ...], Field(min_length=2)] = Field(
        description="Names of strategies."
    )

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna takes it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)


class SpaceConfig(Section):
    """What is varied; whatever is left out stays as the run's file has it."""

    epsilon: FloatRange | None = Field(None, description="Epsilon of a whole run (patient-level, add/remove).")
    noise_multiplier: FloatRange | None = Field(None, description="Noise multiplier, instead of epsilon.")
    learning_rate: FloatRange | None = Field(None, description="training.learning_rate.")
    clip_norm: FloatRange | None = Field(None, description="privacy.max_grad_norm.")
    local_steps: IntRange | None = Field(None, description="federation.local_steps.")
    strategy: Strategies | None = Field(None, description="aggregation.strategy.")
    width: IntRange | None = Field(
        None, description="Channels of the first level of model.features; the others keep their ratio to it."
    )

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("space has both epsilon and noise_multiplier; each follows from the other, keep one")
        if not self.ranges:
            raise ValueError("space is empty; name at least one of " + ", ".join(type(self).model_fields))
        return self

    @property
    def ranges(self) -> dict[str, FloatRange | IntRange | Strategies]:
        """What is varied, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the space as Optuna takes it."""
        return {name: value.distribution() for name, value in self.ranges.items()}


class NumTrials(Section):
    """The random, secret number of trials of a search that releases its best trial alone."""

    distribution: Literal["poisson", "negative_binomial"] = Field(
        "negative_binomial", description="Poisson, or negative binomial without zero."
    )
    mean: Annotated[float, Field(ge=1, le=1000)] = Field(10.0, description="Mean of the distribution.")
    shape: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="Shape of the negative binomial; 1 is the geometric distribution."
    )


class SearchConfig(Section):
    """A whole search."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(
        description="Name of the search; part of its folder's name."
    )
    run: Path = Field(description="YAML file of the final run, relative to this file; its trials are runs like it.")
    overrides: tuple[str, ...] = Field((), description="Overrides of that file for trials and final run alike.")
    data: dict[str, Any] | None = Field(
        None, description="Data section of the trials: phantoms or a public set; the run's own when absent."
    )
    space: SpaceConfig = Field(description="What is varied.")
    trials: Positive = Field(16, description="Number of trials; see num_trials for accounting: select.")
    sampler: Literal["tpe", "nsga2", "random"] = Field("tpe", description="Optuna's multi-objective sampler.")
    seed: int = Field(0, description="Seed of the sampler.")
    stopping: Literal["asha", "median", "none"] = Field(
        "asha", description="Rule that stops trials early on their rounds; one on the front so far is never stopped."
    )
    grace_rounds: Positive = Field(2, description="Rounds that every trial may train.")
    accounting: Literal["public", "compose", "select"] = Field(
        "public",
        description="'public': trials on phantoms or public data, only the final run is charged. 'compose': trials on "
        "private data, each charged to the hospitals' ledgers. 'select': random search that releases its best trial "
        "alone.",
    )
    num_trials: NumTrials | None = Field(None, description="With accounting: select, the random number of trials.")
    score_data: Path | None = Field(
        None, description="Folder of public labelled images, relative to this file, on which trials are judged."
    )
    wanted_dice: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Recommend the smallest epsilon that reaches this; else the best balance on the front."
    )
    pool: Literal["local", "virtual"] = Field(
        "local", description="A trial's hospitals: all in the trial's process, or virtual hospitals on its cores."
    )
    cpus_per_trial: Annotated[float, Field(gt=0, le=64)] = Field(1.0, description="Cores, or a part of one.")
    gpus_per_trial: Annotated[float, Field(ge=0, le=8)] = Field(0.0, description="GPUs, or a part of one.")
    max_concurrent: Positive | None = Field(None, description="Trials at once; as many as fit when absent.")
    fedadam_learning_rate: PositiveFloat = Field(
        0.01, description="aggregation.server_learning_rate where space.strategy draws fedadam; that of fedavg is 1."
    )
    directory: Path = Field(Path("searches"), description="Folder in which the search's own folder is made.")

    @model_validator(mode="after")
    def _selection_is_sound(self) -> Self:
        if self.accounting == "compose" and self.max_concurrent not in (None, 1):
            raise ValueError("accounting: compose trains one trial at a time, on one ledger; leave max_concurrent out")
        if self.accounting != "select":
            if self.num_trials is not None:
                raise ValueError("num_trials belongs to accounting: select; use trials")
            return self
        problem = selection_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self


def selection_problem(search: SearchConfig) -> str | None:
    """Return why repeat-and-select accounting does not hold for a search, or None where it does.

    Source of the conditions: Papernot and Steinke 2022, arXiv:2110.03620, theorems 2 and 6.
    """
    if search.num_trials is None:
        return (
            "accounting: select holds for a number of trials that is drawn from a Poisson or truncated negative "
            "binomial distribution and kept secret; give num_trials instead of trials"
        )
    if search.sampler != "random":
        return (
            f"accounting: select holds for trials that do not see each other; sampler {search.sampler!r} learns from "
            "earlier ones: use sampler: random, or accounting: compose"
        )
    if search.stopping != "none":
        return (
            f"accounting: select holds for trials that do not see each other; stopping {search.stopping!r} compares "
            "them: use stopping: none, or accounting: compose"
        )
    return None


def load_search(path: Path, overrides: tuple[str, ...] = ()) -> SearchConfig:
    """Load a search's YAML file; paths in it become relative to the folder from which it is started.

    Raises:
      ConfigError: the file is missing or not YAML, a key is unknown or a value is out of range.
    """
    from medfl_ray.config.files import parse_model

    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    search = parse_model(SearchConfig, raw, path.name)
    moved: dict[str, Any] = {"run": path.parent / search.run}
    if search.score_data is not None:
        moved["score_data"] = path.parent / search.score_data
    return search.model_copy(update=moved)


def base_run(search: SearchConfig) -> dict[str, Any]:
    """Return the final run's raw configuration, before a trial's parameters.

    Raises:
      ConfigError: the file is missing or not YAML, or an override is malformed.
    """
    raw = read_yaml(search.run)
    for override in search.overrides:
        apply_override(raw, override)
    return raw


def with_parameters(search: SearchConfig, raw: Mapping[str, Any], parameters: Parameters) -> RunConfig:
    """Return the final run's configuration with a trial's parameters.

    Raises:
      ConfigError: they do not fit together.
    """
    run = parse_run_config({**raw}, search.run.name)
    privacy, federation = run.privacy.model_dump(), run.federation.model_dump()
    training, model = run.training.model_dump(), run.model.model_dump()
    aggregation = run.aggregation.model_dump()
    for name, value in parameters.items():
        if name == "epsilon":
            privacy |= {"epsilon": value, "noise_multiplier": None}
        elif name == "noise_multiplier":
            privacy |= {"epsilon": None, "noise_multiplier": value}
        elif name == "learning_rate":
            training["learning_rate"] = value
        elif name == "clip_norm":
            privacy["max_grad_norm"] = value
        elif name == "local_steps":
            federation |= {"local_steps": value, "local_epochs": None}
        elif name == "strategy":
            rate = search.fedadam_learning_rate if value == "fedadam" else 1.0
            aggregation |= {"strategy": value, "server_learning_rate": rate}
        elif name == "width":
            model["features"] = widened(run.model.features, int(value))
        else:
            raise ConfigError(f"a trial has the parameter {name!r}; known are {', '.join(SpaceConfig.model_fields)}")
    sections = {"privacy": privacy, "federation": federation, "training": training, "model": model}
    return parse_run_config({**run.model_dump(), **sections, "aggregation": aggregation}, search.run.name)


def widened(features: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Return a network's channels with another first level, the others in the same ratio to it."""
    return tuple(max(1, round(width * channels / features[0])) for channels in features)


def trial_run(search: SearchConfig, raw: Mapping[str, Any], parameters: Parameters) -> RunConfig:
    """Return what a trial runs: the final run on the trials' data, without baselines and studies.

    Raises:
      ConfigError: parameters and configuration do not fit together.
    """
    own = {**raw, "data": search.data} if search.data is not None else dict(raw)
    run = with_parameters(search, own, parameters)
    actors = max(1, int(search.cpus_per_trial)) if search.pool == "virtual" else None
    federation = {"pool": search.pool, "num_actors": actors, "baselines": ()}
    output = {"report": False, "export": False, "keep_checkpoints": 1}
    gpus = search.gpus_per_trial / (actors or 1)
    return run.model_copy(
        update={
            "federation": run.federation.model_copy(update=federation),
            "output": run.output.model_copy(update=output),
            "training": run.training.model_copy(update={"gpus_per_hospital": gpus}),
            "evaluation": EvaluationConfig(),
        }
    )
