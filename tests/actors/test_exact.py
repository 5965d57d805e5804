"""Exact mode in one process has the bits that it has in actors, however many threads the process may use."""

import pytest
import torch
from small_runs import balls

from actors.train import drive
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("exact", "threads"), [(True, 1), (False, 2)])
def test_only_exact_mode_keeps_to_one_thread(tmp_path, two_threads, exact, threads):
    run = balls(federation={"pool": "local", "exact": exact, "rounds": 1}, output={"directory": tmp_path})
    folder, seen = RunFolder.create(run), []
    outcome = drive(
        folder.run, tuple(list_hospitals(run)), folder.path, lambda event: seen.append(torch.get_num_threads())
    )
    assert outcome.completed
    assert set(seen) == {threads}
    assert torch.get_num_threads() == 2
