"""The sections `train` and `evaluate`: how a model is made, and what it must reach."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cv_platform.config.augmentation import AugmentConfig
from cv_platform.config.fields import Fraction, Section, Text


class MlflowConfig(Section):
    """Where the runs of a stage go in MLflow."""

    exp_name: Text | None = Field(
        default=None, min_length=1, description="MLflow experiment; by default the experiment's name"
    )
    exp_desc: str = Field(default="", description="description of the runs")
    exp_tags: dict[Text, Text] = Field(default_factory=dict, description="tags of the runs")


class TransferConfig(Section):
    """How a network that has learned from other images is trained on these: first a new head, then all of it gently."""

    head: Literal["auto", "fit", "keep"] = Field(
        default="auto",
        description="fit: before anything else, a linear head is fitted to the network's features; keep: transfer is "
        "off; auto: fit for networks that come with weights (efficientnet_lite0), keep for others",
    )
    freeze_until: int = Field(
        default=0,
        ge=0,
        le=8,
        description="stages before this one keep their weights, which makes a step cheaper; efficientnet_lite0: 0 is "
        "the stem, 1 to 7 are its stages, 8 is its last convolution",
    )
    freeze_wide_kernels: bool = Field(
        default=False,
        description="depthwise kernels wider than 3 keep their weights, of all stages: few numbers, whose gradient "
        "is a good part of a step on a CPU",
    )
    rate_decay: float = Field(
        default=0.85, gt=0.0, le=1.0, description="learning rate of a stage, as a share of that of the stage after it"
    )


class TrainConfig(Section):
    """The recipe of one training."""

    epochs: int = Field(
        default=10,
        ge=0,
        le=10_000,
        description="passes over the train split; those after the one that fits the head, where `transfer` does: 0 "
        "leaves the pretrained network as it is",
    )
    batch_size: int = Field(default=64, ge=1, le=8192, description="images of one step")
    workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="processes that take a share of each batch; 1: none besides the one that trains",
    )
    job_gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="trains in a job of the Ray cluster at CV_RAY_JOBS_URL, on a node with a core and so many GPUs to "
        "spare, and decides nothing about the weights; null: in the process of the run",
    )
    init_lr: float = Field(default=1e-3, gt=0.0, le=10.0, description="peak learning rate")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        default="adam", description="sgd uses Nesterov momentum 0.9; adamw keeps the weights' decay out of its moments"
    )
    schedule: Literal["constant", "cosine", "one_cycle"] = Field(
        default="cosine", description="of the learning rate over the steps"
    )
    warmup_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="one_cycle: share of the steps that warm up"
    )
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5, description="share of a label given to the others")
    weight_decay: float = Field(
        default=0.0, ge=0.0, le=1.0, description="L2 penalty on kernels; adamw: share of a kernel that a step takes off"
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="above 0: what is validated and kept is the moving average of the weights, of which each step "
        "keeps this share; 0.99 looks back over about 100 steps",
    )
    mixup_alpha: float = Field(
        default=0.0, ge=0.0, le=10.0, description="above 0: images of a batch are mixed in pairs; 0.2 is usual"
    )
    cutmix_alpha: float = Field(
        default=0.0, ge=0.0, le=10.0, description="above 0: a box of another image is put into each; 1.0 is usual"
    )
    imbalance: Literal["none", "weights", "sampler", "logit_adjustment"] = Field(
        default="none",
        description="multi-class: what makes up for classes with few images; weights: their loss counts more, sampler: "
        "they are drawn more often, logit_adjustment: their logits are lowered in training; probabilities are then "
        "those of classes that occur equally often",
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0.0,
        description="no epoch is begun that would end later, by the slowest so far; a schedule of more epochs is then "
        "cut off, and the same seed need not give the same weights",
    )
    max_images: int | None = Field(
        default=None, ge=1, description="a seeded choice of so many training images, which is held in memory"
    )
    max_images_shown: int | None = Field(
        default=None,
        ge=1,
        description="in all epochs together: a set with more images gets fewer epochs, at least one, and a schedule "
        "that ends with them",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="epochs without a better validation loss"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32", description="auto takes bfloat16 where the GPU has it, or else the CPU; weights stay float32"
    )
    devices: Literal["one", "all"] = Field(
        default="one",
        description="all: each GPU takes a part of every batch, which their number must divide; layers that normalise "
        "by batches see their part alone",
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="of weights, order and augmentation")
    temperature_scaling: bool = Field(
        default=True, description="divide the logits by a temperature fitted on the valid split, for honest confidences"
    )
    transfer: TransferConfig = Field(
        default=TransferConfig(), description="of networks that have learned from other images"
    )
    pack_scale: float = Field(
        default=1.0,
        ge=1.0,
        le=2.0,
        description="above 1: training images are packed so many times as high and wide as the model's input, and each "
        "epoch shows another part of them, the whole at most; all other splits stay as the service sees them",
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes of the training images")
    mlflow: MlflowConfig = Field(default=MlflowConfig(), description="where the training's runs go")


class EvaluateConfig(Section):
    """What a model must reach before it may be exported and deployed."""

    min_accuracy: Fraction = Field(
        default=0.0, description="multi-class: accuracy; multi-label: share of right decisions about known labels"
    )
    min_macro_f1: Fraction = Field(default=0.0, description="mean of the classes' F1")
    thresholds: Literal["fixed", "f1"] = Field(
        default="fixed",
        description="multi-label: model.threshold for each class; f1: where valid has 20 images with the class, and 20 "
        "without, the one with the best F1 there, which the bundle carries and the service uses",
    )
    max_ece: Fraction = Field(
        default=1.0, description="expected calibration error on the test split, after the temperature; 1: any"
    )
    max_cpu_ms: float | None = Field(
        default=None,
        gt=0.0,
        description="CPU milliseconds of one image by the Keras network, on the machine that evaluates",
    )
    max_regression: Fraction = Field(
        default=0.01,
        description="share of right test images that may be lost against the production model, which is asked about "
        "the same images; 1: any",
    )
    max_recall_regression: Fraction = Field(
        default=0.05, description="recall that each class may lose against the production model; 1: any"
    )
    alpha: float = Field(
        default=0.05,
        gt=0.0,
        lt=0.5,
        description="rate at most at which a model that is as good as the production model is called worse",
    )
    undecided: Literal["estimate", "promote", "refuse"] = Field(
        default="estimate",
        description="what follows where the test images are too few to rule out a loss above max_regression, and to "
        "prove one; estimate: what they show may not be above it, and some equal models wait; promote: none does; "
        "refuse: a model that loses more is promoted at a rate of at most alpha, and many equal ones wait",
    )
    robustness_images: int = Field(
        default=200, ge=0, description="test images, sampled, that are corrupted in twelve ways; 0: none"
    )
    worst_errors: int = Field(default=16, ge=0, le=100, description="images shown with the most confident mistakes")
    mlflow: MlflowConfig = Field(default=MlflowConfig(), description="where the evaluation's runs go")
