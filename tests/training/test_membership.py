"""The membership attack: chance for random losses, certainty for separated ones, never on private data."""

import numpy as np
import pytest
from small_runs import small_run

from medfl_ray.data.sources import open_hospital_data
from medfl_ray.errors import DataError
from medfl_ray.training.scoring.membership import attack_membership, membership_auc
from medfl_ray.training.trainer import Trainer


def test_random_losses_are_chance():
    rng = np.random.default_rng(1)
    auc, low, high = membership_auc(rng.normal(size=300).tolist(), rng.normal(size=300).tolist(), 0.95)
    assert auc == pytest.approx(0.5, abs=0.07)
    assert low < 0.5 < high
    assert high - low < 0.15


def test_separated_losses_are_certain_and_the_sign_counts():
    assert membership_auc([0.1, 0.2, 0.3], [0.5, 0.6], 0.95) == (1.0, 1.0, 1.0)
    assert membership_auc([0.5, 0.6], [0.1, 0.2, 0.3], 0.95) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def run():
    phantom = {"num_hospitals": 1, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}
    return small_run(data={"phantom": phantom, "holdout_fraction": 0.4})


@pytest.fixture(scope="module")
def data(run):
    from medfl_ray.data.sources import list_hospitals

    return open_hospital_data(run, (list_hospitals(run)[0].hospital,))


@pytest.fixture(scope="module")
def trainer(run, data):
    shape = (len(data.channels), max(data.labels) + 1, run.patch_size)
    return Trainer(run.model, run.training, run.data.task, run.spatial_dims, *shape, for_dp=False)


def test_an_untrained_model_is_attacked_the_same_way_each_time(trainer, data):
    weights = trainer.initial_weights(0)
    attack = attack_membership(trainer, weights, data, 0.9)
    assert (attack.num_members, attack.num_others) == (data.num_train_patients, len(data.holdout))
    assert 0 <= attack.low <= attack.auc <= attack.high <= 1
    assert attack_membership(trainer, weights, data, 0.9) == attack


def test_private_data_are_refused(trainer, data, monkeypatch):
    monkeypatch.setattr(type(data), "declared", property(lambda self: "private"))
    with pytest.raises(DataError, match="the data are private"):
        attack_membership(trainer, trainer.initial_weights(0), data, 0.95)
