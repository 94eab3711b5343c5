"""Every error that cv_platform raises on purpose; a subclass per decision that a caller can make.

    CvPlatformError
    ├── ConfigError                     a YAML file, an override or an environment variable is wrong
    ├── DatasetError
    │   ├── DatasetNotFoundError        no repository of that name
    │   ├── UnknownDatasetVersionError  the repository has no such tag
    │   └── InvalidDatasetError         the images or annotations cannot make a manifest
    │       └── SuspectLabelsError      labels contradict the images too often; `sources` says whose
    ├── ImageError                      bytes that are no usable image; `status_code` is the HTTP answer
    │   ├── EmptyImageError             400
    │   ├── TruncatedImageError         400
    │   ├── UnsupportedImageError       415
    │   └── ImageTooLargeError          413, decided before decoding
    ├── ComputeError                    processes that work on shards cannot be had
    │   └── ShardError                  shards that kill each process, or images
    ├── EncoderError                    a pretrained network that is not there, or is another one
    ├── VerdictError                    a check upstream failed, so this step refuses to run
    ├── TrainingError                   training cannot start or has diverged
    ├── TrackingError                   MLflow cannot be reached, or refuses what it was given
    ├── DriftError
    │   ├── InvalidSampleError          rows that no test can judge: wrong shape, not finite, or too few
    │   ├── InvalidModelError           a model without the layers that drift detection reads
    │   └── ReferenceMismatchError      reference data of another model version, preprocessing or encoder
    ├── StorageError
    │   ├── BundleNotFoundError         no such model or version
    │   ├── BundleExistsError           versions are immutable
    │   ├── CorruptBundleError          a checksum, the metadata or the self-test does not hold
    │   └── PointerMovedError           somebody else has moved the production pointer since it was read
    ├── ExportError                     a trained model cannot become a bundle or a Bento
    ├── DeploymentError                 the production pointer was not moved
    │   ├── PromotionBusyError          another update is under way: worth trying again
    │   └── ChallengerReturnedError     it was tried out on live traffic, and sent back
    ├── DatabaseError
    │   ├── DatabaseUnavailableError    cannot connect: worth trying again
    │   └── SchemaMismatchError         migrate first: trying again is useless
    ├── LockHeldError                   another process does the same work: worth trying again
    ├── DiskSpaceError                  a large write would fill the disk, so it was not begun
    ├── BackupError                     a backup cannot be made, or must not be restored
    ├── SpoolFullError                  the request log cannot promise durability: the request is refused
    └── ServiceError                    a process of the local stack did not start or answer: worth trying again

Messages say what was expected, what was received and what to do next. Failing verdicts about data are failed asset
checks; `VerdictError` is only for what refuses to build upon them. The Python client has a tree of its own.
"""

from __future__ import annotations

from collections.abc import Mapping


class CvPlatformError(Exception):
    """Root of the tree: catch it to show a message instead of a traceback."""


class ConfigError(CvPlatformError):
    """A config file, a run-config override or an environment variable is wrong."""


class DatasetError(CvPlatformError):
    """A dataset cannot be used."""


class DatasetNotFoundError(DatasetError):
    """There is no dataset repository of that name."""


class UnknownDatasetVersionError(DatasetError):
    """The dataset repository has no such tag."""


class InvalidDatasetError(DatasetError):
    """The images or annotations cannot make a manifest."""


class SuspectLabelsError(InvalidDatasetError):
    """Labels contradict what the other images show more often than they may; `sources` are those who gave them."""

    def __init__(self, message: str, sources: tuple[str, ...]) -> None:
        super().__init__(message)
        self.sources = sources


class ImageError(CvPlatformError):
    """Bytes that are no usable image."""

    status_code = 400
    code = "unusable_image"
    """By which a client of the service tells it from a malformed request of the same status."""


class EmptyImageError(ImageError):
    """No bytes at all."""


class TruncatedImageError(ImageError):
    """The image's data end early."""


class UnsupportedImageError(ImageError):
    """The bytes are not an image of a supported format."""

    status_code = 415


class ImageTooLargeError(ImageError):
    """More bytes or pixels than allowed."""

    status_code = 413


class ComputeError(CvPlatformError):
    """What works on shards cannot be started, or is not what it has to be."""


class ShardError(ComputeError):
    """Shards, or images, have ended each process that worked on them; all others are done, or too many have."""


class EncoderError(CvPlatformError):
    """A pretrained encoder cannot be used: it is not there, is another file, or computes no vectors."""


class VerdictError(CvPlatformError):
    """A check upstream failed, so this step refuses to run."""


class TrainingError(CvPlatformError):
    """Training cannot start, or has diverged."""


class TrackingError(CvPlatformError):
    """MLflow cannot be reached, or refuses what it was given."""


class DriftError(CvPlatformError):
    """Two samples of images cannot be compared."""


class InvalidSampleError(DriftError):
    """Rows that no test can judge: of a wrong shape, not finite, or too few."""


class InvalidModelError(DriftError):
    """A model without the layers that drift detection reads."""


class ReferenceMismatchError(DriftError):
    """Reference data of another model version, preprocessing or encoder; they are never compared."""


class StorageError(CvPlatformError):
    """Central storage cannot be read or written."""


class BundleNotFoundError(StorageError):
    """There is no such model or version in central storage."""


class BundleExistsError(StorageError):
    """That version is already published; versions are immutable."""


class CorruptBundleError(StorageError):
    """A bundle's checksum, metadata or self-test does not hold."""


class PointerMovedError(StorageError):
    """Somebody else has moved the production pointer since it was read; look again before moving it."""


class ExportError(CvPlatformError):
    """A trained model cannot become a bundle or a Bento."""


class DeploymentError(CvPlatformError):
    """The production pointer was not moved."""


class PromotionBusyError(DeploymentError):
    """Another update or rollback of this installation is under way; worth trying again."""


class ChallengerReturnedError(DeploymentError):
    """A challenger was tried out on live traffic and sent back; the champion goes on.

    Attributes:
        numbers: what was counted, as JSON values by name.
    """

    def __init__(self, message: str, numbers: Mapping[str, object]) -> None:
        super().__init__(message)
        self.numbers = numbers


class DatabaseError(CvPlatformError):
    """The request log's database cannot be used."""


class DatabaseUnavailableError(DatabaseError):
    """The database cannot be reached; worth trying again."""


class SchemaMismatchError(DatabaseError):
    """The database has another schema version; migrate first."""


class LockHeldError(CvPlatformError):
    """Another process does what only one at a time may do; worth trying again."""


class DiskSpaceError(CvPlatformError):
    """A large write would fill the disk, so it was not begun."""


class BackupError(CvPlatformError):
    """A backup cannot be made, or must not be restored."""


class SpoolFullError(CvPlatformError):
    """The request log cannot promise durability, so the request is refused."""


class ServiceError(CvPlatformError):
    """A process of the local stack did not start or answer."""
