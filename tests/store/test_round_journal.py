"""The states of a round: in their order, each hospital once, and durable."""

import pytest

from medfl_ray.errors import StorageError
from medfl_ray.messages import RoundPlan
from medfl_ray.store.run.journal import RoundJournal


def plan(round=1, attempt=1):
    return RoundPlan(
        job="job",
        round=round,
        attempt=attempt,
        config_hash="",
        weights_checksum="",
        hospitals=("a", "b"),
        num_steps={"a": 1, "b": 1},
        learning_rate=0.1,
        mechanisms={},
    )


def test_a_round_passes_its_states_in_order_and_is_then_closed(tmp_path):
    journal = RoundJournal(tmp_path)
    assert journal.unfinished() == []
    journal.open(plan())
    for state in ("collecting", "aggregated"):
        assert [one.state for one in RoundJournal(tmp_path).unfinished()] != [state]
        journal.move(plan(), state, "w")
        assert [one.state for one in RoundJournal(tmp_path).unfinished()] == [state]
    journal.move(plan(), "published", "w")
    assert RoundJournal(tmp_path).unfinished() == []


@pytest.mark.parametrize(
    ("passed", "wanted"),
    [
        ((), "aggregated"),
        ((), "published"),
        (("collecting",), "published"),
        (("collecting", "aggregated"), "collecting"),
        (("abandoned",), "collecting"),
        (("collecting", "aggregated", "published"), "abandoned"),
    ],
)
def test_no_state_is_skipped_or_gone_back_to(tmp_path, passed, wanted):
    journal = RoundJournal(tmp_path)
    journal.open(plan())
    for state in passed:
        journal.move(plan(), state)
    with pytest.raises(StorageError, match=f"cannot become {wanted}"):
        journal.move(plan(), wanted)


def test_an_attempt_and_a_delivery_are_there_once(tmp_path):
    journal = RoundJournal(tmp_path)
    journal.open(plan())
    with pytest.raises(StorageError, match="nothing is applied twice"):
        journal.open(plan())
    journal.deliver(plan(), ["b"])
    with pytest.raises(StorageError, match="nothing is applied twice"):
        journal.deliver(plan(), ["a", "b"])
    assert RoundJournal(tmp_path).unfinished()[0].delivered == ("b",)
    journal.open(plan(attempt=2))
    journal.deliver(plan(attempt=2), ["a", "b"])
    assert [one.delivered for one in RoundJournal(tmp_path).unfinished()] == [("b",), ("a", "b")]


def test_a_damaged_journal_is_one_sentence(tmp_path):
    RoundJournal(tmp_path).open(plan())
    for path in tmp_path.iterdir():
        path.write_bytes(b"x" * 4096)
    with pytest.raises(StorageError, match=r"rounds\.sqlite cannot be used: .*backup"):
        RoundJournal(tmp_path).unfinished()
