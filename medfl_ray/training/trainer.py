"""One hospital, one round: weights in, change of the weights out; and the evaluation of given weights.

Shapes: N patients of a step, K patches of a patient, C channels, S voxels per axis, P parameters.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.errors import LabelError, ModelError, NotFitForDP
from medfl_ray.messages import Mechanism
from medfl_ray.models.catalogue import build_network
from medfl_ray.models.channels_last import channels_last_copy
from medfl_ray.params import FlatWeights, Layout, Vector, flatten, is_finite, layout_of, tensors_of
from medfl_ray.privacy.dpsgd import private_steps
from medfl_ray.training.batches import drawn_batches
from medfl_ray.training.devices import choose_device
from medfl_ray.training.gradients.coupling import check_patients_apart
from medfl_ray.training.gradients.engine_choice import choose_group_size, engine_of, make_patient_like
from medfl_ray.training.gradients.memory import give_back_memory, is_out_of_memory
from medfl_ray.training.gradients.patient_gradients import Gradient, GradientEngine, Patient, forward
from medfl_ray.training.local_data import LocalData
from medfl_ray.training.losses import loss_of_each, make_loss, mean_loss
from medfl_ray.training.optimizers import make_optimizer
from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome
from medfl_ray.training.rules.pull import nudge_of
from medfl_ray.training.scoring.evaluation import PatientScore, average_cases, dice_per_label
from medfl_ray.training.scoring.inference import batches_of_one_size, classify, segment
from medfl_ray.training.trained_space import freeze_the_rest

log = structlog.get_logger()
Task = Literal["segmentation", "classification"]
SEED_RANGE = 2**63


class Trainer:
    """Trains and evaluates one network on one hospital's data; holds no state between two calls but the network."""

    def __init__(
        self,
        model: ModelConfig,
        training: TrainingConfig,
        task: Task,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        patch_size: tuple[int, ...],
        for_dp: bool,
        exact: bool = False,
    ) -> None:
        """Build the network.

        Args:
          out_channels: labels with the background, or classes.
          for_dp: check the network for patient-level DP.
          exact: train with PyTorch's own operations in their own order, without DP, as a plain loop would.
        """
        self.device = choose_device(training.device)
        self.training, self._task, self._patch_size, self._for_dp = training, task, patch_size, for_dp
        self._in_channels, self._out_channels = in_channels, out_channels
        self._engine: GradientEngine | None = None
        self._group_size = 1
        self._at_once: int | None = None
        self._build = (model, spatial_dims, in_channels, out_channels, False, patch_size)
        self.network = build_network(model, spatial_dims, in_channels, out_channels, for_dp, patch_size).to(self.device)
        self._space = freeze_the_rest(self.network, training.trainable, training.low_rank, self.dummy_patient()[0][:1])
        # Has the network's own parameters; what is not plain training uses the network itself.
        self._fast_copy = channels_last_copy(self.network, on_cpu=self.device.type == "cpu", same_bits=exact)
        self._sees_the_batch = any(isinstance(module, _BatchNorm) for module in self.network.modules())
        self.loss = make_loss(training.loss, task)
        self.layout: Layout = layout_of(self.network)
        # Walking through a network's modules takes longer than a small hospital can afford at every step.
        self._tensors = tensors_of(self.network)
        self.flat_weights = FlatWeights(self._tensors)

    def initial_weights(self, seed: int) -> Vector:
        """Return fresh weights [P], the same for the same seed on every machine of a kind."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return flatten(build_network(*self._build))

    def train(self, weights: Vector, data: LocalData, job: LocalJob) -> LocalOutcome:
        """Train from the given weights and return their change.

        Raises:
          NotFitForDP: a mechanism is given to a trainer that was not built for DP.
          LabelError: a target exceeds the network's output channels.
          ModelError: training diverged.
        """
        self.refuse_unfit(job)
        self.flat_weights.load(weights)
        self._set_mode(True)
        optimizer = make_optimizer(self.training, self._space.parameters, job.learning_rate)
        nudge = nudge_of(job.pull, weights, self._tensors)
        frozen = [one for name, one in zip(self.layout.names, self._tensors, strict=True) if name in job.frozen]
        losses: list[float] = []
        with self.random_numbers(job) as rng:
            steps = (
                self._private_steps(data, job.mechanism, losses, rng)
                if job.mechanism
                else self._plain_steps(data, losses, rng)
            )
            for _ in range(job.num_steps):
                next(steps)
                if nudge is not None:
                    nudge.add_to_gradients()
                    self._space.restrict_gradients()
                for tensor in frozen:
                    tensor.grad = None
                optimizer.step()
        self._drop_gradients()
        delta = self.flat_weights.change_from(weights)
        if not is_finite(delta):
            raise ModelError("training diverged: the weights are no longer finite; lower training.learning_rate")
        return LocalOutcome(delta, job.num_steps, float(np.mean(losses)) if losses else float("nan"))

    def refuse_unfit(self, job: LocalJob) -> None:
        """Refuse a private job of a trainer whose network was not checked for DP.

        Raises:
          NotFitForDP: that is so.
        """
        if job.mechanism is not None and not self._for_dp:
            raise NotFitForDP("the trainer was built without the DP checks; build it with for_dp=True")

    def evaluate(self, weights: Vector, data: LocalData) -> list[PatientScore]:
        """Score the held-out patients, in the order of their first case; cases of one patient are averaged."""
        return self.score_cases(weights, data.holdout, data.labels)

    def score_cases(
        self, weights: Vector, cases: Iterable[PreparedCase], labels: Mapping[int, str]
    ) -> list[PatientScore]:
        """Score any cases, one at a time; those without a label are left out, those of one patient averaged."""
        self._load_for_inference(weights)
        per_patient: dict[str, list[PatientScore]] = {}
        for case in cases:
            if case.label is not None:
                per_patient.setdefault(case.patient_id, []).append(self._score(case, labels))
        return [average_cases(scores) for scores in per_patient.values()]

    def evaluate_together(self, weights: Vector, hospitals: Sequence[LocalData]) -> list[list[PatientScore]]:
        """Score the held-out patients of several hospitals, images of one size in one pass; as `evaluate` of each."""
        self._load_for_inference(weights)
        cases = [
            (owner, case) for owner, data in enumerate(hospitals) for case in data.holdout if case.label is not None
        ]
        scores: dict[int, PatientScore] = {}
        for batch in batches_of_one_size([case for _, case in cases]):
            scored = self._score_batch([cases[i][1] for i in batch], [hospitals[cases[i][0]].labels for i in batch])
            scores.update(zip(batch, scored, strict=True))
        per_patient: list[dict[str, list[PatientScore]]] = [{} for _ in hospitals]
        for i, (owner, case) in enumerate(cases):
            per_patient[owner].setdefault(case.patient_id, []).append(scores[i])
        return [[average_cases(own) for own in patients.values()] for patients in per_patient]

    def losses(self, weights: Vector, patients: Iterable[Patient]) -> list[float]:
        """Return the loss of each patient's patches under given weights; nothing is trained."""
        self._load_for_inference(weights)
        with torch.inference_mode():
            return [self._patient_losses(self.network, [patient]).item() for patient in patients]

    def predict(self, weights: Vector, case: PreparedCase) -> npt.NDArray[np.uint8]:
        """Return the predicted labels [*S] of one case, or its class [] for classification."""
        self._load_for_inference(weights)
        return self._predict_loaded(case)

    def _plain_steps(self, data: LocalData, losses: list[float], rng: np.random.Generator) -> Iterator[None]:
        """Leave in .grad, step by step, the gradient of the mean loss over a batch of patients."""
        for patients in drawn_batches(self.training, data, rng):
            loss = self._mean_gradient(patients)
            self._space.restrict_gradients()
            losses.append(self._finite(loss))
            yield

    def _mean_gradient(self, patients: Sequence[Patient]) -> float:
        """Leave the gradient of the mean loss in .grad; where memory is exhausted, in smaller passes from then on.

        Raises:
          ModelError: a single patient is too much, or batch normalisation forbids to part the batch.
        """
        while True:
            at_once = min(self._at_once or len(patients), len(patients))
            self._drop_gradients()
            try:
                return self._accumulate(patients, at_once)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if at_once == 1 or self._sees_the_batch:
                raise ModelError(
                    "memory is exhausted by the smallest pass that gives the same result; lower "
                    "training.patch_size_voxels, patches_per_patient or batch_size, or set training.mixed_precision"
                )
            self._at_once = (at_once + 1) // 2
            log.warning("memory_exhausted", patients_in_one_pass=at_once, now=self._at_once)
            give_back_memory()

    def _accumulate(self, patients: Sequence[Patient], at_once: int) -> float:
        """Add up the gradients of passes over so many patients each; return the mean loss."""
        if at_once == len(patients):
            loss = self._mean_loss(patients)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()
        mean = 0.0
        for start in range(0, len(patients), at_once):
            part = self._patient_losses(self._fast_copy, patients[start : start + at_once]).sum() / len(patients)
            part.backward()  # type: ignore[no-untyped-call]
            mean += part.item()
        return mean

    def _private_steps(
        self, data: LocalData, mechanism: Mechanism, losses: list[float], rng: np.random.Generator
    ) -> Iterator[None]:
        """Leave in .grad, step by step, the clipped, summed and noised mean of the patients' gradients."""
        engine = self._choose_engine()

        def gradients(drawn: npt.NDArray[np.intp]) -> Iterator[Gradient]:
            for gradient, loss in engine(self._draw(data, int(index), rng) for index in drawn):
                losses.append(loss)
                yield self._space.narrow(gradient)

        for mean in private_steps(mechanism, self._space.size, data.num_train_patients, gradients):
            self._set_gradients(mean)
            yield
            self._drop_gradients()  # while the next patients' gradients are computed they would only take memory

    def group_size(self) -> int:
        """Return how many patients' gradients are computed in one pass, measured once on made-up patients.

        Raises:
          NotFitForDP: the network mixes patients, whichever way its gradients are computed.
        """
        self._choose_engine()
        return self._group_size

    def _choose_engine(self) -> GradientEngine:
        """Choose once how this machine computes patient gradients, and prove that it keeps patients apart."""
        if self._engine is None:
            training = self.training
            self._group_size = choose_group_size(
                training.patient_gradients,
                self.network,
                self.loss,
                training.mixed_precision,
                self.dummy_patient,
                training.patient_group_size,
            )
            self._engine = engine_of(self._group_size, self.network, self.loss, training.mixed_precision)
            check_patients_apart(self._engine, self.dummy_patient)
        return self._engine

    def dummy_patient(self) -> Patient:
        """Return random patches of the shape that training has, of a patient who does not exist."""
        shape = (self.training.patches_per_patient, self._in_channels, *self._patch_size)
        return make_patient_like(shape, self._out_channels, self._task == "classification", self.device)

    def _mean_loss(self, patients: Sequence[Patient]) -> Tensor:
        """Return the mean loss of the patients, from one forward pass of the quick twin over all their patches."""
        if len({len(images) for images, _ in patients}) > 1:
            return self._patient_losses(self._fast_copy, patients).mean()
        return mean_loss(self.loss, self._logits(self._fast_copy, patients), self._targets(patients))

    def _patient_losses(self, network: nn.Module, patients: Sequence[Patient]) -> Tensor:
        """Return the loss of each patient, [N], from one forward pass over all their patches."""
        logits = self._logits(network, patients)
        counts = [len(images) for images, _ in patients]
        if len(set(counts)) == 1:
            own_logits = logits.reshape(len(patients), -1, *logits.shape[1:])
            return loss_of_each(self.loss)(own_logits, self._targets(patients))
        apart = zip(torch.split(logits, counts), patients, strict=True)
        return torch.stack([self.loss(own, self._targets([patient])[0]) for own, patient in apart])

    def _logits(self, network: nn.Module, patients: Sequence[Patient]) -> Tensor:
        images = self._put(torch.cat([images for images, _ in patients]))
        return forward(network, images, self.training.mixed_precision)

    def _targets(self, patients: Sequence[Patient]) -> Tensor:
        """Return the targets [N, K, *S] of patients with as many patches each, on the device."""
        targets = torch.stack([targets for _, targets in patients])
        self.check_labels(targets)
        return self._put(targets)

    def _draw(self, data: LocalData, index: int, rng: np.random.Generator) -> Patient:
        images, targets = data.train_patches(index, self.training.patches_per_patient, rng)
        self.check_labels(targets)
        return self._put(images), self._put(targets)

    def _put(self, drawn: Tensor) -> Tensor:
        """Copy to the device; to a GPU from pinned memory, beside what it is computing."""
        if self.device.type != "cuda" or drawn.is_cuda:
            return drawn.to(self.device)
        return drawn.pin_memory().to(self.device, non_blocking=True)

    def check_labels(self, targets: Tensor) -> None:
        """Refuse targets that the network has no output channel for.

        Raises:
          LabelError: with the values.
        """
        largest = int(targets.max())
        if largest >= self._out_channels:
            raise LabelError(
                f"a label has value {largest} and the network {self._out_channels} output channels; "
                f"set model.out_channels to {largest + 1} or more, or correct the label"
            )

    def _set_gradients(self, flat: Tensor) -> None:
        for parameter, piece in zip(self._space.parameters, self._space.widen(flat), strict=True):
            parameter.grad = piece.to(self.device, torch.float32).clone()

    def _score(self, case: PreparedCase, labels: Mapping[int, str]) -> PatientScore:
        return self._score_batch([case], [labels])[0]

    def _score_batch(self, cases: Sequence[PreparedCase], labels: Sequence[Mapping[int, str]]) -> list[PatientScore]:
        """Score cases whose images have one size, each with its own names of labels."""
        truths = [np.asarray(case.label) for case in cases]
        if self._task == "segmentation":
            return [
                PatientScore(dice=dice_per_label(prediction, truth, names))
                for prediction, truth, names in zip(self._segment(cases), truths, labels, strict=True)
            ]
        return [
            PatientScore(probabilities=tuple(own.tolist()), truth=int(truth))
            for own, truth in zip(self._probabilities(cases), truths, strict=True)
        ]

    def _predict_loaded(self, case: PreparedCase) -> npt.NDArray[np.uint8]:
        if self._task == "classification":
            return np.asarray(self._probabilities([case])[0].argmax().item(), dtype=np.uint8)
        return np.asarray(self._segment([case])[0], dtype=np.uint8)

    def _segment(self, cases: Sequence[PreparedCase]) -> npt.NDArray[np.uint8]:
        """Return the predicted labels [N, *S] of cases of one size."""
        with torch.inference_mode():
            logits = segment(self.network, self._stack(cases), self._patch_size)
            predicted: npt.NDArray[np.uint8] = logits.argmax(1).to("cpu", torch.uint8).numpy()
        return predicted

    def _probabilities(self, cases: Sequence[PreparedCase]) -> Tensor:
        """Return the class probabilities [N, L] of cases of one size."""
        with torch.inference_mode():
            return classify(self.network, self._stack(cases), self._patch_size).cpu()

    def _stack(self, cases: Sequence[PreparedCase]) -> Tensor:
        return self._put(torch.from_numpy(np.stack([case.image for case in cases])))

    def _load_for_inference(self, weights: Vector) -> None:
        self.flat_weights.load(weights)
        self._set_mode(False)

    def _set_mode(self, mode: bool) -> None:
        for network in (self.network, self._fast_copy):
            if network.training != mode:
                network.train(mode)

    def _drop_gradients(self) -> None:
        for tensor in self._tensors:
            tensor.grad = None

    @contextmanager
    def random_numbers(self, job: LocalJob) -> Iterator[np.random.Generator]:
        """Seed torch for the job (dropout) and give it back as it was; yield the generator of everything else."""
        generators = [torch.default_generator]  # torch.manual_seed and fork_rng do the same at a millisecond a hospital
        if self.device.type == "cuda":
            generators.append(torch.cuda.default_generators[self.device.index or 0])
        before = [generator.get_state() for generator in generators]
        if job.mechanism is not None:
            seed, rng = secrets.randbelow(SEED_RANGE), np.random.default_rng()
        else:
            seeds = np.random.SeedSequence([value % SEED_RANGE for value in job.seed_key])
            seed, rng = int(seeds.generate_state(1, np.uint64)[0] >> 1), np.random.default_rng(seeds)
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield rng
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)

    @staticmethod
    def _finite(loss: float) -> float:
        if not math.isfinite(loss):
            raise ModelError("training diverged: the loss is no longer finite; lower training.learning_rate")
        return loss
