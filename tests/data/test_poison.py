"""What attackers train on: altered patches, while held-out cases stay as they are."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import small_run

from medfl_ray.config.aggregation import AttackConfig
from medfl_ray.data.prepare.attacked_patches import alteration_of, backdoor, flip_labels, stamp
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ConfigError


def test_classes_change_places():
    image, target = np.ones((1, 2, 2), np.float32), np.array([[0, 1], [2, 3]])
    same, flipped = flip_labels(4)(image, target, np.random.default_rng(0))
    assert same is image
    np.testing.assert_array_equal(flipped, [[3, 2], [1, 0]])
    assert flip_labels(2)(image, np.array(1), np.random.default_rng(0))[1] == 0


def test_the_trigger_is_a_bright_corner_and_hides_the_structure():
    image, target = np.arange(2 * 16 * 16, dtype=np.float32).reshape(2, 16, 16), np.ones((16, 16), np.int64)
    stamped = stamp(image)
    assert (stamped[:, :2, :2] == image.max() + 1).all()
    assert (stamped != image).sum() == 2 * 4
    rng = np.random.default_rng(0)
    drawn = [backdoor(image, target, rng) for _ in range(200)]
    triggered = [own_target for own_image, own_target in drawn if (own_image != image).any()]
    assert 70 < len(triggered) < 130
    assert all(not own.any() for own in triggered)
    assert all(own_target.all() for own_image, own_target in drawn if (own_image == image).all())


@pytest.mark.parametrize("kind", ["label_flip", "scaled_backdoor"])
def test_only_the_attackers_training_patches_are_altered(kind):
    clean = small_run()
    first, second, _ = (policy.hospital for policy in list_hospitals(clean))
    run = small_run(attack={"kind": kind, "hospitals": [first]})

    def drawn(run, hospital):
        data = open_hospital_data(run, (hospital,))
        patches = [data.train_patches(i, 2, np.random.default_rng(i))[1].numpy() for i in range(3)]
        return np.stack(patches), data.holdout[0].label

    for hospital, altered in ((first, True), (second, False)):
        (before, held_out), (after, still) = drawn(clean, hospital), drawn(run, hospital)
        assert (before != after).any() == altered
        np.testing.assert_array_equal(held_out, still)


def test_private_data_and_attacks_on_updates_alter_nothing():
    hospital = SimpleNamespace(hospital_id="a", declared="private", labels={1: "x"})
    with pytest.raises(ConfigError, match="private"):
        alteration_of(AttackConfig(kind="label_flip", hospitals=("a",)), [hospital])
    hospital.declared = "public"
    assert alteration_of(AttackConfig(kind="sign_flip", hospitals=("a",)), [hospital]) is None
    assert alteration_of(AttackConfig(kind="label_flip", hospitals=("b",)), [hospital]) is None
    assert alteration_of(None, [hospital]) is None
