"""What a user may configure of an experiment, in YAML; the installation itself is `settings`.

The only place where a default of it is written down. Models are frozen and refuse unknown keys. The section names
(`model`, `dataset`, `train`, `evaluate`, `deploy`) and the fields that the users of the original stack know are kept;
`validate`, `monitor`, `labels`, `loop` and `alerts` are new.

A module for each group of sections; a new field stands in its section's class, with its description.
"""

from cv_platform.config.augmentation import AugmentConfig
from cv_platform.config.experiment import ExperimentConfig, json_schema
from cv_platform.config.fields import ClassifierType, Section, Severity, Threshold, is_class_name
from cv_platform.config.files import (
    config_files,
    load_beside_others,
    load_experiment,
    load_experiments,
    parse_experiment,
)
from cv_platform.config.images import DatasetConfig, EncoderConfig, QuarantineConfig, ValidateConfig
from cv_platform.config.model import DriftDetectionConfig, InputSize, ModelConfig
from cv_platform.config.production import (
    AlertsConfig,
    CanaryConfig,
    DeployConfig,
    DetectorName,
    ExportFormat,
    LabelsConfig,
    LoopConfig,
    MonitorConfig,
    ReplayConfig,
)
from cv_platform.config.recipe import EvaluateConfig, MlflowConfig, TrainConfig, TransferConfig
from cv_platform.config.search import Span, TuneConfig

__all__ = [
    "AlertsConfig",
    "AugmentConfig",
    "CanaryConfig",
    "ClassifierType",
    "DatasetConfig",
    "DeployConfig",
    "DetectorName",
    "DriftDetectionConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "ExportFormat",
    "InputSize",
    "LabelsConfig",
    "LoopConfig",
    "MlflowConfig",
    "ModelConfig",
    "MonitorConfig",
    "QuarantineConfig",
    "ReplayConfig",
    "Section",
    "Severity",
    "Span",
    "Threshold",
    "TrainConfig",
    "TransferConfig",
    "TuneConfig",
    "ValidateConfig",
    "config_files",
    "is_class_name",
    "json_schema",
    "load_beside_others",
    "load_experiment",
    "load_experiments",
    "parse_experiment",
]
