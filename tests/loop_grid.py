"""Flower's grid inside one process, for tests of our messages."""

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from actors.flower import hospital as flower_hospital
from actors.flower.app import client_app


class LoopGrid(Grid):
    """Nodes of this process: each message goes to the ClientApp at once, in a process that remembers nothing."""

    def __init__(self, nodes, app, forgets=False):
        self._nodes, self._app, self._forgets = nodes, app, forgets
        self._replies, self.sent = {}, []

    def set_run(self, run): ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self._nodes)

    def push_messages(self, messages):
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

        numbers = []
        for message in messages:
            number = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            self.sent.append(message)
            assert all(b"pickle" not in part.deflate() for part in get_all_nested_objects(message).values())
            if self._forgets:
                flower_hospital.hospital_of.cache_clear()
            context = Context(
                1, message.metadata.dst_node_id, self._nodes[message.metadata.dst_node_id], RecordDict(), self._app
            )
            self._replies[number] = client_app(message, context)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids):
        return [self._replies.pop(number) for number in message_ids if number in self._replies]
