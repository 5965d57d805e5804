"""The training section of a run: how one hospital trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from medfl_ray.config.base import HospitalId, Positive, PositiveFloat, Section, one_to_many


class TrainingConfig(Section):
    """How one hospital trains."""

    batch_size: Positive = Field(4, description="Patients per step (expected number under DP).")
    patient_order: Literal["shuffled", "listed"] = Field(
        "shuffled", description="Without DP: a new order in every pass, or the data's own, each pass ending short."
    )
    learning_rate: PositiveFloat = Field(1e-2, description="Learning rate of the local optimizer.")
    lr_schedule: Literal["constant", "cosine", "linear", "step"] = Field(
        "constant", description="How the learning rate falls over the rounds."
    )
    lr_step_rounds: Positive = Field(10, description="lr_schedule: step: rounds between two steps.")
    lr_step_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="lr_schedule: step: factor on the learning rate at each step."
    )
    lr_warmup_rounds: Annotated[int, Field(ge=0)] = Field(
        0, description="First rounds in which the learning rate climbs to that of its schedule, in equal parts."
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="Local optimizer; its state lives for one round."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of sgd, beta1 of adam and adamw.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight decay of the local optimizer.")
    initial_weights: Path | None = Field(
        None, description="File of public weights to start from, as medfl-ray pretrain writes it; costs no epsilon."
    )
    initial_weights_sha256: str | None = Field(
        None, description="SHA-256 of that file, written into the run's own configuration and checked on resume."
    )
    loss: Literal["dice_ce", "dice", "cross_entropy", "focal"] = Field(
        "dice_ce", description="Loss; computed within one patient."
    )
    patch_size_voxels: Annotated[tuple[Positive, ...], BeforeValidator(one_to_many)] = Field(
        (32, 32, 32), description="Patch edge lengths in voxels, per axis."
    )
    patches_per_patient: Positive = Field(
        1, description="Patches K whose gradients are averaged into one patient gradient."
    )
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.67, description="Share of patches centred on a labelled voxel."
    )
    augment: bool = Field(True, description="Random flips, scaling and noise on the patches.")
    trainable: Literal["all", "last", "norm", "low_rank"] = Field(
        "all",
        description="What is trained: everything, the last layer, normalisation and small layers, or these and a "
        "low-rank part of the others.",
    )
    low_rank: Positive = Field(2, description="Rank of the trained part of each larger layer, for trainable: low_rank.")
    mixed_precision: bool = Field(
        False, description="bfloat16 autocast in forward and backward; norms and noise stay float64."
    )
    patient_gradients: Literal["auto", "single", "grouped"] = Field(
        "auto", description="Under DP: patient by patient, several as convolution groups, or whichever is faster here."
    )
    patient_group_size: Positive | None = Field(
        None, description="Patients in one pass under DP, 1 for patient by patient; measured at start when absent."
    )
    hospitals_per_group: Positive | None = Field(
        None,
        description="In a simulation: hospitals trained at once as convolution groups, 1 for one after the other; "
        "measured at start when absent, and written into the run's own configuration.",
    )
    measured_group_sizes: dict[HospitalId, Positive] = Field(
        default_factory=dict,
        description="What each hospital measured; the run writes it into its own configuration and reuses it.",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="'auto' uses a GPU where there is one."
    )
    num_workers: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Threads that decode volumes at start; 0 decodes on first use."
    )
    gpus_per_hospital: Annotated[float, Field(ge=0)] = Field(
        0.0, description="GPU share that Ray reserves per actor; 0 shares them evenly."
    )
    client_algo: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None,
        description="'module:function', called with a hospital's name; it returns a monai.fl.client.ClientAlgo that "
        "trains in our trainer's place.",
    )
