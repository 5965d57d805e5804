"""Our runs as a Flower ServerApp and ClientApp, and a user's own ClientApp as a hospital of our runs.

`client_app` and `server_app` are what a Flower project names as components (see examples/flower). The messages are in
messages.py, a hospital's side in hospital.py, Flower's strategies as our aggregation in aggregation.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from actors.flower.aggregation import ARRAYS, identify
from actors.flower.hospital import answer
from actors.flower.messages import HospitalRequest, WireMessage, pack, text_of
from medfl_ray.errors import FederationError
from medfl_ray.params import Vector

SAID = "medfl-ray"
"""Name of the records of our own messages."""


class GridLink:
    """Flower's grid as the way to the hospitals; every message holds JSON and at most one float32 vector."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Sequence[int]:
        """Return the nodes that are connected."""
        return list(self._grid.get_node_ids())

    def send(self, node: int, request: HospitalRequest, vector: Vector | None) -> str:
        """Send a request and return its number.

        Raises:
          FederationError: Flower did not take it.
        """
        content, plan = _content({"request": text_of(request)}, vector), request.plan
        kind = "train" if request.ask in ("train", "alone") else "evaluate" if request.ask == "evaluate" else "query"
        message = Message(
            content, dst_node_id=node, message_type=kind, group_id=str(plan.round if plan else request.round)
        )
        numbers = list(self._grid.push_messages([message]))
        if len(numbers) != 1:
            raise FederationError("Flower did not take a message; the SuperNode is not connected")
        return numbers[0]

    def receive(self, numbers: Sequence[str]) -> Mapping[str, WireMessage | str]:
        """Return the replies that are there, each a parcel or why there will be none."""
        found: dict[str, WireMessage | str] = {}
        for message in self._grid.pull_messages(numbers) if numbers else ():
            number = message.metadata.reply_to_message_id
            # The error's own text may hold a traceback of the hospital's process.
            found[number] = (
                f"Flower brought no answer (its error {message.error.code}); the SuperNode's log has the details"
                if message.has_error()
                else _parcel(message)
            )
        return found


def _content(fields: Mapping[str, Any], vector: Vector | None) -> RecordDict:
    content = RecordDict({SAID: ConfigRecord(dict(fields))})
    if vector is not None:
        content[ARRAYS] = ArrayRecord({"vector": Array(np.ascontiguousarray(vector, dtype=np.float32))})
    return content


def _parcel(message: Message) -> WireMessage | str:
    try:
        said = message.content.config_records[SAID]
        pictures = tuple(bytes(picture) for picture in said.get("pictures", []))  # type: ignore[union-attr, arg-type]
        return WireMessage(str(said["kind"]), str(said["body"]), _vector_of(message), pictures)
    except (KeyError, TypeError, ValueError):
        return "its SuperNode answered with other records than ours"


def _vector_of(message: Message) -> Vector | None:
    record = message.content.array_records.get(ARRAYS)
    return None if record is None else np.asarray(record["vector"].numpy(), dtype=np.float32)


client_app = ClientApp()


@client_app.query()
@client_app.evaluate()
@client_app.train()
def hospital(message: Message, context: Context) -> Message:
    """Answer one request as the hospital that this node is."""
    text = str(message.content.config_records[SAID]["request"])
    parcel = pack(answer(text, _vector_of(message), context.node_config, context.run_config))
    fields: dict[str, Any] = {"kind": parcel.kind, "body": parcel.body}
    if parcel.pictures:
        fields["pictures"] = list(parcel.pictures)
    return Message(_content(fields, parcel.vector), reply_to=message)


server_app = ServerApp()


@server_app.main()
def federation(grid: Grid, context: Context) -> None:
    """Run the federation that the app's setting `run` names, or go on with that of `resume`, with Flower's nodes.

    Raises:
      MedflError: as of `run_federation`; what was published before is kept.
    """
    from actors.flower.run import run_over_flower

    run_over_flower(GridLink(grid), context.run_config)


def algo_of(app: ClientApp, hospital: str, partition_id: int, num_partitions: int, settings: Mapping[str, Any]) -> Any:
    """Return a user's own Flower ClientApp as a MONAI ClientAlgo, for `training.client_algo` of our runs.

    Its train function gets an ArrayRecord "arrays" and returns one, beside a MetricRecord "metrics"; its evaluate
    function returns metrics. Both see `partition-id` and `num-partitions` in the node's configuration, and `settings`
    as the run's, as in Flower's quickstarts.
    """
    from actors.flower.algo import FlowerAlgo

    state = RecordDict()

    def ask(kind: str, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        identify()
        node: Any = {"partition-id": partition_id, "num-partitions": num_partitions}
        content = RecordDict({ARRAYS: ArrayRecord(dict(arrays)), "config": ConfigRecord(dict(settings))})
        context = Context(0, partition_id, node, state, dict(settings))
        reply = app(Message(content, dst_node_id=partition_id, message_type=kind), context)
        returned = reply.content.array_records.get(ARRAYS)
        metrics = [dict(record) for record in reply.content.metric_records.values()]
        return {} if returned is None else dict(returned.to_torch_state_dict()), metrics[0] if metrics else {}

    return FlowerAlgo(ask, hospital)
