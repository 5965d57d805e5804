"""Prepared cases within a limit of memory: the longest unused goes first, and comes back the same."""

import errno
import gc
import os

import numpy as np
import pytest
from small_runs import small_run

from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.phantoms.source import phantom_hospital_names
from medfl_ray.data.prepare.cache import MemoryBudget, PreparedCases, num_bytes_of
from medfl_ray.data.sources import open_hospital_data
from medfl_ray.errors import UnreadableFile

EDGE = 4
CASE_BYTES = EDGE**3 * (4 + 1)


class Loaders:
    """Loaders of cases that count how often each was asked."""

    def __init__(self, count):
        self.calls = [0] * count

    def all(self):
        return [lambda i=i: self._load(i) for i in range(len(self.calls))]

    def _load(self, i):
        self.calls[i] += 1
        image = np.full((1, EDGE, EDGE, EDGE), i, np.float32)
        return PreparedCase(f"p{i}", f"c{i}", image, np.full((EDGE,) * 3, i, np.uint8), np.eye(4))


def test_the_longest_unused_case_makes_room():
    loaders, budget = Loaders(3), MemoryBudget(2 * CASE_BYTES)
    cases = PreparedCases(loaders.all(), budget=budget)
    assert num_bytes_of(cases[0]) == CASE_BYTES
    _ = cases[1], cases[0], cases[2]  # 1 is the longest unused when 2 comes
    _ = cases[0], cases[2]
    assert loaders.calls == [1, 1, 1]
    assert cases[1].image[0, 0, 0, 0] == 1
    assert loaders.calls == [1, 2, 1]
    assert budget.used == 2 * CASE_BYTES


def test_without_a_limit_each_case_is_prepared_once():
    loaders = Loaders(5)
    cases = PreparedCases(loaders.all())
    for _ in range(3):
        assert [case.image.max() for case in cases] == [0, 1, 2, 3, 4]
    assert loaders.calls == [1] * 5


def test_a_case_larger_than_the_limit_is_used_and_not_kept():
    loaders, budget = Loaders(1), MemoryBudget(CASE_BYTES - 1)
    cases = PreparedCases(loaders.all(), budget=budget)
    assert cases[0].case_id == cases[0].case_id == "c0"
    assert loaders.calls == [2]
    assert budget.used == 0


def test_hospitals_share_one_limit_and_a_closed_one_gives_its_memory_back():
    budget = MemoryBudget(3 * CASE_BYTES)
    first, second = (PreparedCases(Loaders(2).all(), budget=budget) for _ in range(2))
    held = [*first, *second]
    assert budget.used == 3 * CASE_BYTES  # the first hospital's first case had to go
    del second, held
    gc.collect()
    assert budget.used == CASE_BYTES


def test_memory_maps_on_disk_do_not_count():
    budget = MemoryBudget(1)
    loaders = Loaders(2)
    cases = PreparedCases(loaders.all(), "disk", budget)
    assert [case.image.max() for case in [*cases, *cases]] == [0, 1, 0, 1]
    assert loaders.calls == [1, 1]
    assert budget.used == 0


@pytest.mark.parametrize("cache_mb", [None, 1])
def test_patches_are_the_same_with_and_without_a_limit(cache_mb):
    phantom = {"num_hospitals": 1, "patients_per_hospital": 8, "size_voxels": 64, "seed": 3}
    run = small_run(data={"phantom": phantom, "cache_mb": cache_mb}, training={"patch_size_voxels": 16})
    data = open_hospital_data(run, phantom_hospital_names(run.data.phantom))
    rng = np.random.default_rng(0)
    drawn = [data.train_patches(i % data.num_train_patients, 1, rng)[0].sum().item() for i in range(12)]
    limited = cache_mb is not None
    kept = len(data._cases._kept)
    assert kept < data.num_train_patients if limited else kept == data.num_train_patients
    free = open_hospital_data(
        small_run(data={"phantom": phantom}, training={"patch_size_voxels": 16}), data.hospital_ids
    )
    rng = np.random.default_rng(0)
    assert drawn == [free.train_patches(i % free.num_train_patients, 1, rng)[0].sum().item() for i in range(12)]


def full_disk(monkeypatch, number, fails=lambda path: True):
    """Let writing to the cache's own folder fail as a machine without space, files or permission does."""
    import medfl_ray.data.prepare.cache as cache

    real = cache._mapped

    def fail(array, path):
        if fails(path):
            path.write_bytes(b"half of it")
            raise OSError(number, os.strerror(number), str(path))
        return real(array, path)

    monkeypatch.setattr(cache, "_mapped", fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("file", ["1.image.npy", "1.label.npy"])
def test_hole_a_disk_that_is_full_excludes_no_case(monkeypatch, tmp_path, number, file):
    full_disk(monkeypatch, number, lambda path: path.name == file)
    loaders = Loaders(3)
    cases = PreparedCases(loaders.all(), "disk", root=tmp_path)
    assert cases.problems(2) == {}
    assert [case.image.max() for case in [*cases, *cases]] == [0, 1, 2, 0, 1, 2]
    assert loaders.calls == [1, 3, 1]
    assert not list(tmp_path.rglob("1.*.npy")), "no half of a case is left on a full disk"
    cases.close()


def test_a_full_disk_is_told_once_in_the_hospitals_own_log_without_any_path(monkeypatch, tmp_path):
    from structlog.testing import capture_logs

    full_disk(monkeypatch, errno.ENOSPC)
    with capture_logs() as lines:
        assert PreparedCases(Loaders(3).all(), "disk", root=tmp_path).problems(1) == {}
    (line,) = lines
    assert (line["event"], line["reason"]) == ("cache_cannot_be_written", os.strerror(errno.ENOSPC))
    assert str(tmp_path) not in str(line)


def too_many_files_in_a_readers_words():
    from medfl_ray.data.formats.readers import _plain_errors

    with _plain_errors():
        raise OSError(errno.EMFILE, "Too many open files")


def raises(error):
    raise error


def torch_asks_for_too_much():
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def cuda_is_full():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to take 2 GiB")


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (lambda: raises(MemoryError()), MemoryError),
        (lambda: raises(OSError(errno.ENFILE, "Too many open files in system")), OSError),
        (too_many_files_in_a_readers_words, UnreadableFile),
        (torch_asks_for_too_much, RuntimeError),
        (cuda_is_full, RuntimeError),
    ],
    ids=["memory", "files", "files in a reader's words", "memory in torch's words", "memory of a GPU"],
)
def test_hole_a_machine_without_memory_or_files_excludes_no_case(load, kind):
    cases = PreparedCases([*Loaders(2).all(), load])
    with pytest.raises(kind):
        cases.problems(2)


def test_a_file_that_cannot_be_read_is_its_own_cases_fault():
    cases = PreparedCases([*Loaders(1).all(), lambda: raises(OSError(errno.EIO, "x")), lambda: raises(KeyError("x"))])
    assert sorted(cases.problems(1)) == [1, 2]


def test_an_error_of_torch_that_is_not_of_memory_is_its_own_cases_fault():
    cases = PreparedCases([*Loaders(2).all(), lambda: raises(RuntimeError("expected a 5D tensor"))])
    assert cases.problems(1) == {2: "case at position 3: RuntimeError while it was read"}
