"""The evaluation section of a run: which figures there are, and which studies follow the last round."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config.base import Fraction, Positive, Section

FigureName = Literal["dice", "precision", "recall", "volume_error", "hd95", "surface_dice"]


class EvaluationConfig(Section):
    """Figures on held-out patients, and studies after the last round. It changes no weight of the federated model."""

    metrics: tuple[FigureName, ...] = Field(
        ("dice",),
        description="Figures per label of a segmentation; all but Dice at the last evaluation only, since they take "
        "time. volume_error is in ml (in 2D cm2), hd95 in mm.",
    )
    surface_tolerance_mm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Distance up to which a boundary counts as right in surface_dice."
    )
    calibration: bool = Field(
        False, description="At the last evaluation: a reliability diagram and ECE, of data that may be shown."
    )
    cross_site: bool = Field(
        False, description="Score each hospital's own model on every other hospital; trains the local baselines."
    )
    leave_one_out: bool = Field(
        False, description="For each hospital, train a federation without it and score that model on it."
    )
    contributions: Literal["leave_one_out", "shapley"] | None = Field(
        None, description="Estimate what each hospital adds to the pooled score, from federations of fewer hospitals."
    )
    permutations: Positive = Field(
        24, description="Most random orders of the hospitals for Shapley values; of few hospitals, all orders are used."
    )
    truncation: Annotated[float, Field(ge=0)] = Field(
        0.01, description="An order is broken off once the score is within this of that of all hospitals together."
    )
    study_rounds: Positive | None = Field(
        None, description="Rounds of each federation of fewer hospitals; federation.rounds when absent."
    )
    target_dice: Fraction | None = Field(
        None, description="Mean Dice over hospitals whose first round is reported, beside the central baseline's."
    )

    @model_validator(mode="after")
    def _dice_stays(self) -> Self:
        if "dice" not in self.metrics:
            raise ValueError("evaluation.metrics has no dice, by which a segmentation is judged; add it")
        return self

    @property
    def more_metrics(self) -> tuple[FigureName, ...]:
        """The figures beyond Dice, each once, in the order in which they are named."""
        return tuple(dict.fromkeys(name for name in self.metrics if name != "dice"))

    @property
    def is_full(self) -> bool:
        """Whether the last evaluation has more than the scores of each round."""
        return bool(self.more_metrics) or self.calibration

    @property
    def has_studies(self) -> bool:
        """Whether federations of fewer hospitals, or models of single ones, are trained after the last round."""
        return self.cross_site or self.leave_one_out or self.contributions is not None
