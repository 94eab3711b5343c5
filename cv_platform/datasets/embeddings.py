"""What the images of a dataset version show, as vectors: a row per image, for everything that compares images.

`home/embeddings/<ds_name>/<md5>-<hash>/vectors.parquet` has `path`, `sha256` and `vector` (float16) of the manifest's
images that are used, in its order. It is made once for a manifest and an encoder, and only of images that no other
version had: `encoders.embeddings` keeps their vectors by content.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cv_platform.compute.engine import Engine
from cv_platform.config import EncoderConfig
from cv_platform.datasets.image_files import ImageFiles
from cv_platform.datasets.manifest import manifest_parts
from cv_platform.datasets.origins import Files, Origin
from cv_platform.datasets.publishing import Sharing, find_origin
from cv_platform.encoders.embeddings import embed_files
from cv_platform.encoders.encoder import Encoder, open_encoder
from cv_platform.errors import DatasetError
from cv_platform.files import exclusive, require_free_space, whole_directory
from cv_platform.records import DatasetVersion, Embeddings

logger = logging.getLogger(__name__)

_ROWS_PER_GROUP = 4096


def embed_dataset(
    version: DatasetVersion,
    config: EncoderConfig,
    *,
    home: Path,
    spare_bytes: int | None = None,
    engine: Engine | None = None,
    sharing: Sharing | None = None,
) -> Embeddings:
    """Returns the vectors of a version's images that are used, and computes those that no version had.

    An image that the manifest calls readable and that does not decode now, or ends its processes, has no row.

    Args:
        version: the checkout; only read.
        config: the encoder.
        home: `Settings.home`.
        spare_bytes: see `files.require_free_space`.
        engine: who computes; None: processes of this machine.
        sharing: central storage, where machines that do not see the checkout read its images; None: they are refused.

    Raises:
        EncoderError: the encoder cannot be used.
        InvalidDatasetError: a file is not the one that the manifest describes.
        DiskSpaceError: there is not enough disk space.
        ComputeError, StorageError: see `publishing.find_origin`.
        ShardError: see `encoders.embeddings.embed_files`.
    """
    encoder = open_encoder(config, home, version.sample_bits)
    name = hashlib.sha256(f"{version.manifest}\n{encoder.key}".encode()).hexdigest()[:12]
    directory = home.absolute() / "embeddings" / version.provenance.ds_name / f"{version.provenance.dvc_md5}-{name}"
    file = directory / Embeddings.FILE
    with exclusive(directory.parent / f".{directory.name}.lock"):
        if (images := _rows(file, encoder.features)) is None:
            parts = manifest_parts(version.manifest_path, ("path", "sha256", "status"))
            kept = [part.filter(pa.array([it == "used" for it in part["status"].to_pylist()])) for part in parts]
            readable = pa.concat_tables(kept).to_pandas()
            # What is computed anew is kept twice: by content, too.
            needed = 2 * len(readable) * (2 * encoder.features + 128)
            purpose = f"the embeddings of {version.provenance.ds_name}"
            require_free_space(home, needed, purpose=purpose, spare_bytes=spare_bytes)
            started = time.perf_counter()

            @functools.cache
            def origin() -> Origin:  # Late: where all vectors are known, nobody needs the images.
                seen_by = version.manifest_path
                return find_origin(
                    version.directory, version.provenance, seen_by=seen_by, engine=engine, sharing=sharing
                )

            vectors = embed_images(readable, lambda paths: origin().files(paths), encoder, home, engine=engine)
            with whole_directory(directory) as partial:
                images = _write(partial / file.name, readable, vectors)
            logger.info("%d images have embeddings, after %.1f s: %s", images, time.perf_counter() - started, directory)
    return Embeddings(
        provenance=version.provenance,
        manifest=version.manifest,
        encoder=encoder.key,
        features=encoder.features,
        images=images,
        directory=directory,
    )


def embed_images(
    rows: pd.DataFrame,
    files: Callable[[Sequence[str]], Files],
    encoder: Encoder,
    home: Path,
    *,
    engine: Engine | None = None,
) -> NDArray[np.float16]:
    """Returns `(N, features)` float16 of rows of a manifest, NaN where an image does not decode.

    Args:
        rows: columns path and sha256.
        files: returns some of them, by their paths, see `Origin.files`.
        encoder: what computes the vectors.
        home: keeps them, see `encoders.embeddings`.
        engine: who computes; None: processes of this machine.

    Raises:
        InvalidDatasetError, StorageError: see `Files.described`.
        ShardError: see `encoders.embeddings.embed_files`.
    """
    paths, sha256 = rows["path"].tolist(), rows["sha256"].tolist()

    def pixels(part: Sequence[int]) -> ImageFiles:
        digests = tuple(sha256[at] for at in part)
        return ImageFiles(files([paths[at] for at in part]), digests, encoder.input_px, encoder.sample_bits)

    return embed_files(sha256, pixels, encoder, home, names=paths, engine=engine)


def read_embeddings(embeddings: Embeddings, manifest: str, paths: Iterable[str]) -> NDArray[np.float16]:
    """Returns `(N, features)` float16, the vectors of images by their paths, NaN where one has none.

    Args:
        embeddings: of the dataset version at hand.
        manifest: its name; embeddings of another one are refused.
        paths: as in the manifest.

    Raises:
        DatasetError: the embeddings are of another version, or gone.
    """
    remedy = "Materialise embeddings, then this asset."
    if embeddings.manifest != manifest:
        raise DatasetError(f"Expected embeddings of {manifest}. Received: those of {embeddings.manifest}. {remedy}")
    try:
        with pq.ParquetFile(embeddings.path) as file:
            names, values = [], np.empty((file.metadata.num_rows + 1, embeddings.features), np.float16)
            values[-1] = np.nan
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["path", "vector"])
                start = len(names)
                names += table["path"].to_pylist()
                column = table["vector"].combine_chunks().flatten().to_numpy()
                values[start : len(names)] = column.reshape(table.num_rows, -1)
    except (OSError, ValueError, KeyError, pa.ArrowException) as err:
        raise DatasetError(f"Expected embeddings at {embeddings.path}. Received: {err}. {remedy}") from err
    return values[pd.Index(names).get_indexer(pd.Index(list(paths)))]


def _rows(file: Path, features: int) -> int | None:
    """Returns how many rows a complete file has; None where there is none."""
    try:
        metadata, schema = pq.read_metadata(file), pq.read_schema(file)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as err:
        logger.warning("The embeddings %s are unreadable (%s); they are written again", file, err)
        return None
    return metadata.num_rows if schema.equals(_schema(features)) else None


def _write(file: Path, readable: pd.DataFrame, vectors: NDArray[np.float16]) -> int:
    """Writes a row for each image that has a vector, and returns how many."""
    schema = _schema(vectors.shape[1])
    kept = np.flatnonzero(~np.isnan(vectors[:, 0]))
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(kept), _ROWS_PER_GROUP):
            part = kept[start : start + _ROWS_PER_GROUP]
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[part].ravel()), vectors.shape[1])
            names = [readable[name].iloc[part].tolist() for name in ("path", "sha256")]
            writer.write_table(pa.table([*map(pa.array, names), column], schema=schema))
    return len(kept)


def _schema(features: int) -> pa.Schema:
    return pa.schema([("path", pa.string()), ("sha256", pa.string()), ("vector", pa.list_(pa.float16(), features))])
