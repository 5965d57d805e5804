"""The precisions that a model can be exported and run in; apart, because commands name them before anything loads."""

from typing import Literal

VariantName = Literal["float32", "float16", "int8"]
