"""A user's own Flower ClientApp in the form of a MONAI ClientAlgo. This file imports no Flower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monai.fl.client.client_algo import ClientAlgo
from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject

Ask = Callable[[str, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
"""Sends "train" or "evaluate" with named tensors and returns named tensors and metrics."""


class FlowerAlgo(ClientAlgo):
    """Trains and evaluates by the functions of a ClientApp; `ask` calls it."""

    def __init__(self, ask: Ask, hospital: str) -> None:
        self._ask, self._hospital = ask, hospital
        self._weights: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"FlowerAlgo({self._hospital})"

    def train(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> None:
        """Have the ClientApp train from the given weights."""
        self._weights, _ = self._ask("train", data.weights or {})

    def get_weights(self, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """Return the weights of the last training."""
        return ExchangeObject(weights=self._weights, weight_type=WeightType.WEIGHTS)

    def evaluate(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """Have the ClientApp score weights."""
        _, metrics = self._ask("evaluate", data.weights or {})
        return ExchangeObject(metrics=metrics)
