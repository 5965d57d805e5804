"""The model section of a run: which network is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config.base import Positive, Section


class ModelConfig(Section):
    """Which network is trained."""

    type: Literal[
        "unet3d",
        "unet2d",
        "basic_unet",
        "segresnet",
        "dynunet",
        "attention_unet",
        "unetr",
        "swin_unetr",
        "densenet",
        "custom",
        "bundle",
    ] = Field(
        "unet3d",
        description="Name in the model catalogue, 'custom' for a network of your own, or 'bundle' for MONAI's.",
    )
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None,
        description="With type 'custom': 'module:function', called with spatial_dims, in_channels and out_channels; "
        "it returns a torch.nn.Module.",
    )
    network: dict[str, Any] | None = Field(
        None,
        description="With type 'bundle': definition of the network; model.bundle, the folder of a MONAI bundle in a "
        "run's file, fills it.",
    )
    size_divisor: Positive = Field(
        1, description="With types 'custom' and 'bundle': what every input edge is a multiple of."
    )
    in_channels: Positive | None = Field(None, description="Image channels; read from the data when absent.")
    out_channels: Positive | None = Field(
        None, description="Output channels, background included; read from the data when absent."
    )
    features: tuple[Positive, ...] = Field((8, 16, 32), description="Feature channels per resolution level.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout probability.")
    spatial_dims: Literal[2, 3] | None = Field(
        None, description="Dimensions of the network; those of the data when absent."
    )
    norm: Literal["group", "instance"] = Field(
        "group", description="Normalisation layer; batch norm couples patients and is refused."
    )

    @model_validator(mode="after")
    def _factory_belongs_to_custom(self) -> Self:
        if (self.type == "custom") != (self.factory is not None):
            raise ValueError("model.type 'custom' and model.factory belong together; set both or neither")
        if (self.type == "bundle") != (self.network is not None):
            raise ValueError(
                "model.type 'bundle' needs the folder of a MONAI bundle as model.bundle in the run's file, or its "
                "definition as model.network; other types take neither"
            )
        return self
