"""Mixtures of two images and of their labels: mixup and CutMix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cv_platform.config import TrainConfig


@dataclass(frozen=True)
class Mixing:
    """Mixes the images of a batch in pairs, by one share for all of them; only the arguments decide the result.

    mixup adds their pixels (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"). CutMix puts a box of the
    second into the first (Yun et al. 2019, "CutMix"). Where both are on, each batch gets one of them. A label of a
    mixture is known where those of both images are: NaN is unknown, and stays so.

    Attributes:
        mixup_alpha: of the Beta(alpha, alpha) that the share is drawn from; 0: no mixup.
        cutmix_alpha: as for mixup.
        seed: of shares and pairs.
    """

    mixup_alpha: float
    cutmix_alpha: float
    seed: int

    @classmethod
    def of(cls, train: TrainConfig) -> Mixing:
        """Returns what a recipe asks for."""
        return cls(train.mixup_alpha, train.cutmix_alpha, train.seed)

    def __call__(
        self, images: np.ndarray, targets: np.ndarray, *, epoch: int, batch_index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(N, H, W, 3)` uint8 images and `(N, C)` float32 targets whose rows are shares of two."""
        kinds = [name for name in ("mixup", "cutmix") if getattr(self, f"{name}_alpha") > 0]
        if not kinds:
            return images, targets
        rng = np.random.default_rng((self.seed, epoch, batch_index, 1))
        kind = kinds[int(rng.integers(len(kinds)))]
        share = float(rng.beta(alpha := getattr(self, f"{kind}_alpha"), alpha))
        others = rng.permutation(len(images))
        if kind == "mixup":
            mixed = images * np.float32(share) + images[others] * np.float32(1 - share)
            images = np.rint(mixed).astype(np.uint8)
        else:
            height, width = images.shape[1:3]
            box = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
            top, left = int(rng.integers(height - box[0] + 1)), int(rng.integers(width - box[1] + 1))
            inside = (slice(None), slice(top, top + box[0]), slice(left, left + box[1]))
            images, share = images.copy(), 1 - box[0] * box[1] / (height * width)
            images[inside] = images[others][inside]
        return images, (targets * share + targets[others] * (1 - share)).astype(np.float32)
