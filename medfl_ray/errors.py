"""Every error that medfl-ray raises on purpose.

    MedflError
    |-- ConfigError            a run or site configuration is wrong
    |-- DataError              the images or labels are wrong
    |   |-- UnreadableFile     a file cannot be read or parsed
    |   |-- LayoutError        a folder is not one of the known layouts
    |   |-- GeometryError      spacing, orientation, slices or shapes do not fit together
    |   `-- LabelError         a label is missing, outside its range or of the wrong kind
    |-- ModelError             a network cannot be built, or not for this task
    |-- PrivacyError
    |   |-- PrivacyConfigError privacy settings are impossible or unsound
    |   |-- NotFitForDP        a network, loss or transform couples patients
    |   |-- BudgetExceeded     a step would exceed a hospital's budget
    |   `-- LedgerError        the ledger cannot be trusted or written
    |-- FederationError
    |   |-- QuorumLost         too few hospitals delivered an update
    |   |-- UpdateRejected     an update does not fit the round it claims
    |   |-- StorageError    a checkpoint is missing, damaged or cannot be written
    |   |-- ReceiptError       a receipt was changed, left out or signed by somebody else
    |   `-- HospitalLost       a hospital's process ended before it answered
    |-- ExportError            a model could not be exported, or its package is not what it says
    |-- InferenceError         a model could not be run on an image
    |-- RegistryError          the model registry cannot be used, or lacks what was asked for
    |   |-- ArtifactDamaged    a file of a model is missing, or is not the one that was registered
    |   |-- RegistryAltered    a record of the registry is not what the registry signed
    |   `-- PromotionRefused   the gate does not let a model version become champion
    `-- ClusterError           Ray could not be reached, started or trusted

A message says what was seen, what was expected and what to change. It never holds a patient
identifier or a secret. Each error has one string argument, so that it survives pickling.
"""


class MedflError(Exception):
    """Base of every error that is meant for the user."""


class ConfigError(MedflError, ValueError):
    """A run or site configuration is wrong."""


class DataError(MedflError, ValueError):
    """The images or labels are wrong."""


class UnreadableFile(DataError):
    """A file cannot be read or parsed."""


class LayoutError(DataError):
    """A folder is not one of the known layouts, or contradicts itself."""


class GeometryError(DataError):
    """Spacing, orientation, slices or shapes do not fit together."""


class LabelError(DataError):
    """A label is missing, outside its range or of the wrong kind."""


class ModelError(MedflError, ValueError):
    """A network cannot be built, or does not suit the task."""


class PrivacyError(MedflError):
    """Base of every privacy error."""


class PrivacyConfigError(PrivacyError, ValueError):
    """Privacy settings are impossible or unsound."""


class NotFitForDP(PrivacyError, ValueError):
    """A network, loss or transform couples patients, so that its gradient has no bounded sensitivity."""


class BudgetExceeded(PrivacyError):
    """A step would exceed a hospital's privacy budget."""


class LedgerError(PrivacyError):
    """The privacy ledger cannot be trusted, read or written."""


class FederationError(MedflError):
    """Base of every error of a run."""


class QuorumLost(FederationError):
    """Too few hospitals delivered an update; nothing was published."""


class UpdateRejected(FederationError):
    """An update does not fit the round it claims to belong to."""


class StorageError(FederationError):
    """A checkpoint is missing, damaged or cannot be written."""


class ReceiptError(FederationError):
    """A receipt was changed, left out, or signed by somebody else."""


class HospitalLost(FederationError):
    """A hospital's process ended before it answered."""


class ExportError(MedflError):
    """A model could not be exported, its parity check failed, or its package is not what it says."""


class InferenceError(MedflError):
    """A model could not be run on an image, or gave an answer that is none."""


class RegistryError(MedflError):
    """The model registry cannot be used, or lacks what was asked for."""


class ArtifactDamaged(RegistryError):
    """A file of a model is missing, or is not the one that was registered."""


class RegistryAltered(RegistryError):
    """A record of the registry is not what the registry signed."""


class PromotionRefused(RegistryError):
    """The gate does not let a model version become champion."""


class ClusterError(MedflError):
    """Ray could not be reached, started or trusted."""
