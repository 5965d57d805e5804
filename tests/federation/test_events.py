"""Events survive a process boundary and a JSON stream."""

import json
import pickle

import pytest
from pydantic import ValidationError

from medfl_ray.federation.events import BaselineProgress, HospitalState, Notice, PhaseStarted, RunEnded, parse_event
from medfl_ray.messages import PrivacySpent

EVENTS = [
    PhaseStarted(name="federated", total_rounds=3),
    HospitalState(hospital="A", state="training", step=1, num_steps=5),
    HospitalState(hospital="A", state="done", spent=PrivacySpent(epsilon=1, delta=1e-5, budget=8)),
    BaselineProgress(baseline="central", done=1, total=2),
    Notice(message="hello"),
    RunEnded(message="done"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_round_trips(event):
    assert pickle.loads(pickle.dumps(event)) == event
    assert parse_event(json.loads(event.model_dump_json())) == event


def test_an_unknown_type_or_state_is_refused():
    with pytest.raises(ValidationError, match="type"):
        parse_event({"type": "gossip"})
    with pytest.raises(ValidationError, match="state"):
        parse_event({"type": "hospital", "hospital": "A", "state": "dancing"})
