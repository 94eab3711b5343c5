"""Images of `score.source` that nobody has labelled, for the labelling queue: rows of `scores.parquet`, and bytes.

Labels belong to predictions with an upload. An image that is asked about therefore gets both in the request log, as an
answer of `client` "folder", which no window, replay or accuracy counts: nobody sent it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cv_platform.database.schema import FOLDER
from cv_platform.predictions import BBSD_FEATS, FEATURES, MODEL_VERSION, PREDICTED_CLASS, PROPERTIES, UAE_FEATS
from cv_platform.records import BatchScores
from cv_platform.scored_rows import read_answers, read_rows
from cv_platform.scoring.sources import read_scored

_COLUMNS = ("path", "sha256", MODEL_VERSION, PREDICTED_CLASS, UAE_FEATS, BBSD_FEATS, FEATURES, PROPERTIES)
_NAMESPACE = UUID("5b0c4f0e-6f57-4c11-9a7e-2d3c1c0f7a61")


@dataclass(frozen=True)
class UnlabelledImages:
    """Images of a folder with what the model said of them.

    Attributes:
        scores: whose rows.
        scratch: where an archive is unpacked.
    """

    scores: BatchScores
    scratch: Path

    def least_sure(self, most: int) -> pd.DataFrame:
        """Returns the rows that the model was least sure of, as `predictions` has them, with their `path`.

        Images without an answer, and further copies of one, are left out. Row groups are read one after the other: of
        all rows, 13 bytes stay.
        """
        path = self.scores.directory / BatchScores.FILE
        with pq.ParquetFile(path) as file:
            classes = json.loads((file.schema_arrow.metadata or {})[b"classes"])
            answers = read_answers(file)
            rows = np.flatnonzero(answers.is_there)
            doubtful = rows[np.argsort(answers.confidence[rows], kind="stable")]
            chosen = answers.first_of_copies(doubtful)[:most]
            table = read_rows(file, np.sort(chosen), _COLUMNS).take(pa.array(np.argsort(np.argsort(chosen))))
        found: dict[str, list[Any]] = {name: table[name].to_pylist() for name in _COLUMNS}
        answers = [dict(zip(classes, said, strict=True)) for said in found[BBSD_FEATS]]
        model = str(self.scores.model)
        ids = [uuid5(_NAMESPACE, f"{model}\n{sha256}") for sha256 in found["sha256"]]
        return pd.DataFrame(
            {
                "prediction_id": ids,
                "model_name": self.scores.model.model_name,
                **{name: values for name, values in found.items() if name != "sha256"},
                "image_sha256": found["sha256"],
                "prediction_json": answers,
                "client": FOLDER,
            }
        )

    def read(self, path: str, sha256: str) -> bytes:
        """Returns the image that was scored.

        Raises:
            StorageError: it is gone, or another one is in its place.
        """
        return read_scored(self.scores.source, self.scratch, path, sha256)
