"""The federation section of a run: rounds, who takes part, and which processes do the work."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config.base import Fraction, Positive, PositiveFloat, Section


class FederationConfig(Section):
    """Rounds and who takes part."""

    rounds: Positive = Field(10, description="Number of rounds.")
    local_epochs: PositiveFloat | None = Field(
        None, description="Expected passes over a hospital's patients per round."
    )
    local_steps: Positive | None = Field(None, description="Steps per round, instead of local_epochs.")
    local_steps_schedule: Literal["constant", "decay"] = Field(
        "constant",
        description="How the local steps change over the rounds: 'decay' divides them by the square root of the "
        "round, for few exchanges early and little drift late (after AdaComm; decided in public, not by a loss).",
    )
    max_local_steps: Positive | None = Field(
        None, description="Most steps of a hospital in a round, where local_epochs gives a large one more."
    )
    min_clients: Positive = Field(1, description="Updates without which a round is not published.")
    min_available_clients: Positive = Field(1, description="Hospitals that must be present to start.")
    fraction: Fraction = Field(1.0, description="Share of the available hospitals asked in a round.")
    over_selection: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of hospitals asked beyond `fraction`; the round closes when enough have delivered, and "
        "what the others spent stays spent. Who is in time then decides the result: no bitwise repeat.",
    )
    deadline_s: PositiveFloat | None = Field(
        None,
        description="Seconds from a round's start after which it closes without the missing hospitals; its evaluation "
        "has as long again.",
    )
    stragglers: Literal["drop", "keep"] = Field(
        "drop",
        description="An update that misses the deadline: dropped, or kept for the next round if it is there by then.",
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        2,
        description="Times that a hospital is asked again within a round after a passing fault; once training has "
        "begun, with differential privacy off only, since a second training would be a second charge.",
    )
    max_hospital_failures: Positive = Field(
        3,
        description="Rounds in a row that a hospital may fail before it is left out: for 1 round, then 2, 4, up to 16; "
        "an update that arrives sets it back.",
    )
    max_failed_rounds: Annotated[int, Field(ge=0)] = Field(
        2, description="Consecutive rounds below quorum after which the run stops."
    )
    eval_every: Positive = Field(1, description="Rounds between evaluations on the held-out patients.")
    seed: int = Field(
        0, description="Seed of initial weights, selection and, with DP off, of sampling and augmentation."
    )
    pool: Literal["ray", "local", "virtual"] = Field(
        "ray", description="A Ray actor per hospital, all in one process, or virtual hospitals that share few actors."
    )
    exact: bool = Field(
        False,
        description="Each hospital trains with PyTorch's own operations in their own order, virtual ones alone: the "
        "same bits with every pool, and those of a plain loop. Slower, above all for volumes.",
    )
    eval_hospitals: Positive | None = Field(
        None, description="With virtual hospitals: how many evaluate, drawn once; all of them when absent."
    )
    num_actors: Positive | None = Field(
        None, description="Ray actors that share the hospitals; one per hospital when absent."
    )
    placement: Literal["spread", "pack"] = Field(
        "spread",
        description="Ray actors of hospitals that no node names: spread over the nodes, or one node filled first.",
    )
    baselines: tuple[Literal["local", "central"], ...] = Field(
        (), description="Baselines to train beside the federation."
    )
    patience: Positive | None = Field(
        None,
        description="Evaluations without a better mean score over the hospitals after which the run ends; none when "
        "absent. Refused where differential privacy keeps the scores of private data from deciding.",
    )
    min_improvement: Annotated[float, Field(ge=0)] = Field(
        0.0, description="By how much a score must exceed the best one before it to count as better."
    )
    keep: Literal["last", "best"] = Field(
        "last", description="Weights that are exported: of the last round, or of the one with the best mean score."
    )

    @model_validator(mode="before")
    @classmethod
    def _enough_are_available(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "min_clients" in raw:
            return {"min_available_clients": raw["min_clients"], **raw}
        return raw

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("federation has both local_epochs and local_steps; keep one")
        if self.stragglers == "keep" and self.deadline_s is None:
            raise ValueError("federation.stragglers is keep, but without deadline_s a round waits for everybody")
        if self.min_clients > self.min_available_clients:
            raise ValueError("federation.min_clients exceeds min_available_clients; a round could never be published")
        return self
