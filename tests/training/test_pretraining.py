"""A pretraining that was stopped goes on to the very weights that it would have had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medfl_ray.config.pretrain import PretrainConfig
from medfl_ray.data.phantoms.structure_crops import SURROUNDINGS, Surroundings
from medfl_ray.training import pretraining
from medfl_ray.training.pretraining import pretrain

CONFIG = PretrainConfig.model_validate(
    {
        "name": "small",
        "crops": {"labelmaps": "maps", "margin_voxels": [1, 2]},
        "model": {"type": "unet3d", "features": [4, 8]},
        "training": {"steps": 6, "batch_size": 2, "patch_size_voxels": 8, "learning_rate": 0.01},
    }
)


def structures() -> tuple[Surroundings, ...]:
    labels = np.full((8 + 2 * SURROUNDINGS,) * 3, 2, np.int16)
    labels[(slice(SURROUNDINGS, SURROUNDINGS + 8),) * 3] = 17
    return (Surroundings(labels, 17),)


class Stopped(Exception):
    pass


def stop_after(steps: int):
    def progress(step: int, loss: float) -> None:
        if step == steps:
            raise Stopped

    return progress


def test_a_stopped_pretraining_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "STEPS_BETWEEN_SAVES", 2)
    device, parts = torch.device("cpu"), structures()
    layout, whole = pretrain(CONFIG, parts, device, lambda step, loss: None, tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(CONFIG, parts, device, stop_after(5), tmp_path / "half")
    seen: list[int] = []
    _, resumed = pretrain(CONFIG, parts, device, lambda step, loss: seen.append(step), tmp_path / "half")
    assert seen == [5, 6]
    assert whole.shape == (layout.size,)
    np.testing.assert_allclose(resumed, whole, atol=1e-7)
    assert not (tmp_path / "half").exists()


def test_the_state_of_another_pretraining_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "STEPS_BETWEEN_SAVES", 2)
    with pytest.raises(Stopped):
        pretrain(CONFIG, structures(), torch.device("cpu"), stop_after(3), tmp_path / "state")
    other = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"seed": 7})})
    seen: list[int] = []
    pretrain(other, structures(), torch.device("cpu"), lambda step, loss: seen.append(step), tmp_path / "state")
    assert seen == [1, 2, 3, 4, 5, 6]
