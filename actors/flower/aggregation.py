"""A Flower strategy in the place of the mean over a round's updates."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies
from flwr.supercore.task_identity import TaskIdentity

from actors.flower.state import Records, StrategyArrays, capture, restore
from medfl_ray import params
from medfl_ray.aggregation.strategies import ServerState
from medfl_ray.aggregation.updates import Updates
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError, FederationError
from medfl_ray.federation.events import Event, Notice
from medfl_ray.params import Layout, Vector

FirstWeights = Callable[[int, int], tuple[Layout, Vector]]
ARRAYS, METRICS = "arrays", "metrics"
OURS_INSTEAD = {
    "FedProx": "aggregation.proximal_mu with any strategy",
    "QFedAvg": "aggregation.strategy: qfedavg",
}
RECORDS = Records(
    ArrayRecord,
    lambda record: {name: array.numpy() for name, array in record.items()},
    lambda arrays: ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()}),
    flower_strategies.Strategy,
)


class FlowerAggregation:
    """A Flower strategy in the place of the mean: its `aggregate_train` sees one reply per update.

    `configure_train` is called too, because strategies take the round's weights there; whom it would ask is ignored,
    since who trains is the run's to say. What the strategy remembers goes through the server's state in every round,
    so that a resumed run goes on from the same bits.
    """

    def __init__(self, run: RunConfig, emit: Callable[[Event], None]) -> None:
        """Raises ConfigError where the strategy cannot be made or does not go with the run."""
        self._settings = run.aggregation.flower
        self._num_checked = max(run.federation.min_clients, 2)
        self._emit = emit
        self._layout: Layout | None = None
        check_flower(run)
        self._new_strategy()

    def checked(self, first_weights: FirstWeights) -> FirstWeights:
        """Return a function that also tries the strategy on made-up updates, before any hospital trains."""

        def build(in_channels: int, out_channels: int) -> tuple[Layout, Vector]:
            self._layout, weights = first_weights(in_channels, out_channels)
            self._try_out(weights)
            return self._layout, weights

        return build

    def __call__(self, updates: Updates, server_state: ServerState, weights: Vector) -> tuple[Vector, ServerState]:
        """Return the change of the weights that the strategy makes of a round's updates, and what it remembers."""
        strategy = self._new_strategy()
        number = restore(strategy, RECORDS, server_state) + 1
        rows = updates.rows(0, weights.size)
        vector = self._aggregate(strategy, number, weights, list(zip(rows, updates.weights, strict=True)))
        if vector is None:
            name = type(strategy).__name__
            self._emit(Notice(message=f"note: {name} made nothing of {len(updates)} updates; the weights stay"))
            vector = weights
        kept: StrategyArrays = capture(strategy, RECORDS, number)
        return vector - weights, kept

    def _aggregate(
        self, strategy: Any, number: int, weights: Vector, updates: Sequence[tuple[Vector, float]]
    ) -> Vector | None:
        """Return the weights [P] after a round, or None where the strategy makes none of so few updates.

        Raises:
          ConfigError: the strategy asks hospitals for something, or waits for more of them than there are.
          FederationError: what it returned is not the network.
        """
        assert self._layout is not None  # the first weights are built before any round
        layout, key = self._layout, getattr(strategy, "weighted_by_key", "num-examples")
        identify()
        before = _record(weights, layout)
        messages = list(strategy.configure_train(number, before, ConfigRecord(), _Delivered(len(updates))))
        _refuse_wishes(type(strategy).__name__, messages)
        replies = [
            _reply(
                node,
                {
                    getattr(strategy, "arrayrecord_key", ARRAYS): _record(weights + update, layout),
                    METRICS: MetricRecord({key: int(weight)}),
                },
            )
            for node, (update, weight) in enumerate(updates, start=1)
        ]
        after, _ = strategy.aggregate_train(number, replies)
        return None if after is None else _vector(after, layout, type(strategy).__name__)

    def _try_out(self, weights: Vector) -> None:
        strategy, zeros = self._new_strategy(), np.zeros_like(weights)
        name = type(strategy).__name__
        try:
            self._aggregate(strategy, 1, weights, [(zeros, 1.0)] * self._num_checked)
            capture(strategy, RECORDS, 1)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - it is the user's code, and the run has not begun
            instead = f"; use {OURS_INSTEAD[name]} instead" if name in OURS_INSTEAD else ""
            raise ConfigError(
                f"the Flower strategy {name} cannot aggregate what hospitals of a run send, the weights and their "
                f"number of examples ({type(error).__name__}: {error}){instead}"
            ) from None

    def _new_strategy(self) -> Any:
        return build_flower_strategy(self._settings.strategy, self._settings.options)


def build_flower_strategy(name: str, options: Mapping[str, Any]) -> Any:
    """Return a strategy of Flower's by its name, or a user's own as 'module:Class'.

    Flower's own waits for two nodes by default; ours has those that delivered, and the run's quorum is min_clients.

    Raises:
      ConfigError: there is no such class, or it does not take these options.
    """
    module, _, attribute = name.rpartition(":")
    try:
        kind = getattr(importlib.import_module(module) if module else flower_strategies, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"aggregation.flower.strategy {name!r} cannot be imported ({type(error).__name__}); name a class of "
            "flwr.serverapp.strategy, or your own as 'module:Class' on the PYTHONPATH of the process that coordinates"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, flower_strategies.Strategy)):
        raise ConfigError(f"aggregation.flower.strategy {name!r} is no subclass of flwr.serverapp.strategy.Strategy")
    if kind.__name__.startswith("DifferentialPrivacy"):
        raise ConfigError(
            f"aggregation.flower.strategy {name!r} adds noise that no ledger of this project accounts for; use "
            "privacy.unit: patient or hospital"
        )
    of_flower = issubclass(kind, flower_strategies.FedAvg)
    quorum = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1} if of_flower else {}
    try:
        return kind(**{**quorum, **options}) if kind.__init__ is not object.__init__ else kind()
    except (TypeError, ValueError) as error:
        if not set(options) and quorum:
            return kind()  # a subclass with a constructor of its own
        raise ConfigError(f"aggregation.flower.options do not fit {kind.__name__}: {error}") from None


def check_flower(run: RunConfig) -> None:
    """Refuse runs in which a Flower strategy would see what it must not, or would be scaled behind its back.

    Raises:
      ConfigError: with what to change.
    """
    if run.aggregation.server_learning_rate != 1:
        raise ConfigError(
            "aggregation.server_learning_rate does not go with strategy 'flower', whose weights are taken as they are; "
            "set the strategy's own rate in aggregation.flower.options"
        )


class _Delivered(Grid):
    """The hospitals that delivered an update, as the nodes that a strategy may count; nothing is sent to them."""

    def __init__(self, count: int) -> None:
        self._count, self._asked = count, 0

    def get_node_ids(self) -> Iterable[int]:
        self._asked += 1
        if self._asked > 3:  # Flower asks again every second until there are enough
            raise ConfigError(
                f"the Flower strategy waits for more hospitals than delivered an update ({self._count}); lower its "
                "min_available_nodes and min_train_nodes, or raise federation.min_clients"
            )
        return range(1, self._count + 1)

    @property
    def run(self) -> Any:
        raise ConfigError("a Flower strategy may not look at the run through its grid; there is none behind it")

    def set_run(self, run: Any) -> None:
        raise ConfigError("a Flower strategy may not set the run of its grid; there is none behind it")

    def create_message(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    def push_messages(self, messages: Iterable[Message]) -> NoReturn:
        self._refuse()

    def pull_messages(self, message_ids: Iterable[str]) -> NoReturn:
        self._refuse()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError("a Flower strategy may not send messages of its own; who trains and on what is the run's")


def identify() -> None:
    """Give Flower's messages a sender where no Flower task runs in this process, and keep its log to warnings."""
    for name in ("run_id", "task_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 0)
            logging.getLogger("flwr").setLevel(logging.WARNING)


def _refuse_wishes(name: str, messages: Sequence[Message]) -> None:
    """Refuse a strategy that asks hospitals for more than to train: nobody would listen."""
    wishes = {key for m in messages for record in m.content.config_records.values() for key in record}
    wishes -= {"server-round"}
    if wishes:
        instead = f"; use {OURS_INSTEAD[name]}" if name in OURS_INSTEAD else ""
        raise ConfigError(
            f"the Flower strategy {name} asks hospitals for {', '.join(sorted(wishes))}, which they would not "
            f"hear{instead}"
        )


def _record(vector: Vector, layout: Layout) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(part)) for name, part in params.to_tensors(vector, layout).items()})


def _reply(node: int, records: Mapping[str, Any]) -> Message:
    request = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(RecordDict(dict(records)), reply_to=request)


def _vector(record: ArrayRecord, layout: Layout, name: str) -> Vector:
    arrays = {key: array.numpy() for key, array in record.items()}
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    if arrays.keys() != shapes.keys() or any(arrays[key].shape != shape for key, shape in shapes.items()):
        raise FederationError(f"the Flower strategy {name} returned arrays whose names or shapes are not the network's")
    vector = np.concatenate([np.asarray(arrays[key], dtype=np.float32).ravel() for key in layout.names])
    if not np.isfinite(vector).all():
        raise FederationError(f"the Flower strategy {name} returned weights that are no numbers")
    return vector
