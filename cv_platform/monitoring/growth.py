"""Makes the labels in the log the next version of the dataset: `cv-platform dataset grow`.

What a grown version holds besides the images of its origin follows from the log alone: the labelled uploads that it
keeps now. Grown again from any of its versions, the dataset comes to the same; an upload that was deleted, or whose
label was withdrawn, is in no later version. Every added file is named by the prediction that it came with, and
`provenance.csv` in the version's commit says who labelled it, and when.

An image keeps its split as long as it is in the dataset. Of near-copies, one is added, and none of an image that is
there. `docs/how-to/labels.md` tells it from the user's side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from uuid import UUID

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sqlalchemy import Engine

from cv_platform import images
from cv_platform.config import ExperimentConfig
from cv_platform.database.uploads import read_images
from cv_platform.datasets.embeddings import embed_dataset, embed_images, read_embeddings
from cv_platform.datasets.importing import check_names
from cv_platform.datasets.manifest import read_manifest, read_thumbnails
from cv_platform.datasets.near_copies import OVERVIEW_PX, find_near_copies, thumbnail
from cv_platform.datasets.origins import Origin
from cv_platform.datasets.repository import StoredVersion, read_file
from cv_platform.datasets.sources.entries import ImageEntry, Layout, contradict
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import read_layout
from cv_platform.datasets.sources.tree import walk
from cv_platform.datasets.splits import SPLITS, deal_additions
from cv_platform.datasets.successors import SuccessorImage, store_successor
from cv_platform.datasets.versions import check_out_images, checkout_version, open_repository
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import ImageError, SuspectLabelsError
from cv_platform.files import exclusive, require_free_space, scratch_directory
from cv_platform.monitoring.labels import CollectedLabels, LabelledUpload, collect_labels, fates
from cv_platform.predictions import LABEL_SEPARATOR
from cv_platform.records import DatasetVersion
from cv_platform.validation.label_sources import SourceVerdict, judge_sources

PROVENANCE = "provenance.csv"
PROVENANCE_COLUMNS = (
    *("path", "sha256", "split", "label", "prediction_id", "source", "stated_on", "received_on", "model_version"),
    "predicted_class",
)
_NAME = re.compile(r"labelled-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
GROWN_SUFFIX = re.compile(r"-grown-[0-9a-f]{8}$")
"""What the tag of a grown version adds to that of its origin."""
_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp"}
_FETCHED_AT_ONCE = 50
_MOST_COMPARED = 5_000
"""Images of the dataset, a sample of them, that labels are judged by."""


@dataclass(frozen=True)
class GrownVersion:
    """What `grow_dataset` came to.

    Attributes:
        base: the version that it began with.
        version: the new one; `base` where nothing changes; None of a dry run.
        summary: what changed and what was left out, a sentence a line.
        sources: what the other images say about who labelled.
    """

    base: StoredVersion
    version: StoredVersion | None
    summary: tuple[str, ...]
    sources: tuple[SourceVerdict, ...]


@dataclass(frozen=True)
class GrowthRules:
    """What a user decides.

    Attributes:
        new_tag: of the version; None: the base's with a suffix that follows from its content.
        trusted: sources whose labels count, however often they contradict the other images.
        without: sources whose labels do not count.
        is_dry_run: nothing is stored.
    """

    new_tag: str | None = None
    trusted: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    is_dry_run: bool = False


@dataclass(frozen=True, eq=False)
class _Image:
    """An image of the version that grows.

    Attributes:
        path: in the manifest.
        place: below the folder of images.
        sha256: as in the manifest.
        split: likewise; of an image that takes no part the one that it was given, or train.
        is_used: it takes part.
        group: see `ImageEntry`.
        labels: class names, sorted.
        unknown_labels: see `ImageEntry`.
        thumbnail: `(32, 32)` uint8.
        grown_by: the prediction that it was added with; None of the dataset's own images.
    """

    path: str
    place: str
    sha256: str
    split: str
    labels: tuple[str, ...]
    unknown_labels: tuple[str, ...]
    is_used: bool
    group: str | None
    thumbnail: NDArray[np.uint8]
    grown_by: UUID | None

    def is_contradicted(self, upload: LabelledUpload) -> bool:
        """Says whether an upload that shows the same has another label, as far as is known of this image."""
        return contradict((self.labels, self.unknown_labels), (upload.labels, ()))


@dataclass(frozen=True, eq=False)
class _Base:
    """The version that grows: its own images, and by sha256 those that it has grown by."""

    stored: StoredVersion
    checkout: DatasetVersion
    layout: Layout
    own: tuple[_Image, ...]
    grown: dict[str, _Image]

    @property
    def preprocessing(self) -> images.Preprocessing:
        """By which its images are looked at."""
        return images.Preprocessing(sample_bits=self.checkout.sample_bits)

    def compared(self) -> list[_Image]:
        """Returns its own images that can be read, of copies one, in an order that follows from their content."""
        distinct = {image.sha256: image for image in self.own if image.is_used}
        return [distinct[sha256] for sha256 in sorted(distinct)]


@dataclass(frozen=True)
class _Added:
    """An image of the log in the new version: its row of `provenance.csv`, and its file."""

    row: dict[str, str]
    labels: tuple[str, ...]
    file: Path

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.row[name] for name in ("path", "sha256", "split", "label"))


def grow_dataset(
    config: ExperimentConfig, engine: Engine, rules: GrowthRules, *, home: Path, spare_bytes: int | None = None
) -> GrownVersion:
    """Adds the version that the configured one becomes with the labels in the log.

    Args:
        config: whose dataset, model and limits.
        engine: of the request log.
        rules: what the user decides.
        home: `Settings.home`.
        spare_bytes: see `files.require_free_space`.

    Raises:
        SuspectLabelsError: labels of a source are likely wrong; nothing was changed.
        InvalidDatasetError: a class would lose its last image, or the tag is taken by other content; likewise.
        DatasetError, DatabaseUnavailableError, SchemaMismatchError: see there.
    """
    repository = open_repository(config.dataset, home=home)
    base = _read_base(config, repository, home)
    collected = collect_labels(engine, config.model, without=rules.without)
    left_out = {reason: list(ids) for reason, ids in collected.left_out.items()}
    name = f"{repository.name}.labels"
    with exclusive(repository.parent / f".{name}.lock"), scratch_directory(repository.parent, name) as scratch:
        wanted = _wanted(base, collected, left_out)
        files = _fetch(engine, base, wanted, scratch, left_out, spare_bytes)
        wanted = _distinct([upload for upload in wanted if upload.sha256 in files], base, files, left_out)
        sources = _judge(config, base, wanted, files, home, spare_bytes)
        _refuse_suspects(config, sources, wanted, rules.trusted)
        after = _placed(config, base, wanted, files)
        departed = [image for sha256, image in base.grown.items() if sha256 not in {one.sha256 for one in wanted}]
        fate = fates(engine, [image.grown_by for image in departed if image.grown_by])
        if config.labels.keep_expired:
            expired = [image for image in departed if image.grown_by and fate[image.grown_by] == "expired"]
            after += _kept(base, repository, expired)
            departed = [image for image in departed if image not in expired]
        departures = Counter(fate[image.grown_by] for image in departed if image.grown_by)
        summary = (
            *_changes(base, after, departures),
            *(f"left out: {len(ids)} {reason}, such as {ids[0]}" for reason, ids in sorted(left_out.items())),
            *(_told(verdict) for verdict in sources),
        )
        if {image.key for image in after} == {_key(image) for image in base.grown.values()}:
            return GrownVersion(base.stored, base.stored, summary, sources)
        tag = rules.new_tag or f"{GROWN_SUFFIX.sub('', base.stored.tag)}-grown-{_digest(after)}"
        check_names(repository.name, tag)
        if rules.is_dry_run:
            return GrownVersion(base.stored, None, summary, sources)
        version = _store(repository, tag, base, after, summary)
        return GrownVersion(base.stored, version, summary, sources)


def _read_base(config: ExperimentConfig, repository: Path, home: Path) -> _Base:
    stored, directory = check_out_images(repository, config.dataset.dvc_tag, home=home)
    checkout = checkout_version(config.dataset, config.model, home=home)
    layout = read_layout(walk(directory / stored.data_path), stored.annotations, LabelRules(is_stored=True))
    stored_as = {entry.path: entry for entry in layout.entries}
    own: list[_Image] = []
    grown: dict[str, _Image] = {}
    rows = read_manifest(checkout.manifest_path).to_dict("records")
    for row, small in zip(rows, read_thumbnails(checkout.manifest_path), strict=True):
        place = row["path"].removeprefix(f"{stored.data_path}/")
        name = _NAME.match(PurePosixPath(place).name)
        image = _Image(
            path=row["path"],
            place=place,
            sha256=row["sha256"],
            split=row["split"] or stored_as[place].split or "train",
            labels=tuple(sorted(row["labels"])),
            unknown_labels=tuple(row["unknown_labels"]),
            is_used=row["status"] == "used",
            group=stored_as[place].group,
            thumbnail=small,
            grown_by=UUID(name[1]) if name else None,
        )
        if name:
            grown[image.sha256] = image
        else:
            own.append(image)
    return _Base(stored, checkout, layout, tuple(own), grown)


def _wanted(base: _Base, collected: CollectedLabels, left_out: dict[str, list[str]]) -> list[LabelledUpload]:
    """Returns the uploads that are no images of the dataset's own; those that it has grown by come first."""
    own = {image.sha256: image for image in base.own}
    wanted: list[LabelledUpload] = []
    for upload in collected.uploads:
        if (image := own.get(upload.sha256)) is None:
            wanted.append(upload)
            continue
        reason = "of images that the dataset has"
        if image.is_contradicted(upload):
            reason += " with another label (cv-platform relabel changes those)"
        left_out.setdefault(reason, []).append(str(upload.prediction_id))
    return sorted(wanted, key=lambda upload: upload.sha256 not in base.grown)


def _fetch(
    engine: Engine,
    base: _Base,
    wanted: Sequence[LabelledUpload],
    scratch: Path,
    left_out: dict[str, list[str]],
    spare_bytes: int | None,
) -> dict[str, Path]:
    """Returns the file of each upload by sha256: in the checkout, or fetched; one that does not decode has none."""
    files = {sha256: base.checkout.directory / image.path for sha256, image in base.grown.items()}
    missing = [upload for upload in wanted if upload.sha256 not in files]
    for start in range(0, len(missing), _FETCHED_AT_ONCE):
        part = missing[start : start + _FETCHED_AT_ONCE]
        contents = read_images(engine, [upload.sha256 for upload in part])
        require_free_space(scratch, sum(map(len, contents.values())), purpose="uploads", spare_bytes=spare_bytes)
        for upload in part:
            content = contents.get(upload.sha256, b"")  # Deleted a moment ago, say.
            try:
                name, _, _ = images.read_size(content, max_pixels=images.MAX_LOCAL_PIXELS)
                images.read_image(content, max_pixels=images.MAX_LOCAL_PIXELS, preprocessing=base.preprocessing)
            except ImageError:
                left_out.setdefault("whose upload is gone or does not decode", []).append(str(upload.prediction_id))
                continue
            files[upload.sha256] = scratch / f"{upload.sha256}{_ENDINGS.get(name, '.img')}"
            files[upload.sha256].write_bytes(content)
    return files


def _distinct(
    wanted: list[LabelledUpload], base: _Base, files: Mapping[str, Path], left_out: dict[str, list[str]]
) -> list[LabelledUpload]:
    """Returns one upload of each set of near-copies, and none of an image of the dataset's own."""
    own = base.compared()
    stack = [image.thumbnail for image in own]
    for upload in wanted:
        if (image := base.grown.get(upload.sha256)) is not None:
            stack.append(image.thumbnail)
        else:
            content = files[upload.sha256].read_bytes()
            seen = images.read_image(
                content,
                max_pixels=images.MAX_LOCAL_PIXELS,
                preprocessing=base.preprocessing,
                overview_px=OVERVIEW_PX,
            )
            stack.append(thumbnail(seen.pixels))
    if not wanted:
        return []
    sets = find_near_copies(np.stack(stack)).sets(len(stack)).tolist()
    image_of = dict(zip(sets, own, strict=False))
    taken, kept = set[int](), list[LabelledUpload]()
    for upload, number in zip(wanted, sets[len(own) :], strict=True):
        if upload.sha256 in base.grown or not (number in image_of or number in taken):
            kept.append(upload)
            taken.add(number)
            continue
        is_own = number in image_of
        reason = "near-copies of images that the dataset has" if is_own else "near-copies of other uploads"
        if is_own and image_of[number].is_contradicted(upload):
            reason += ", with another label"
        left_out.setdefault(reason, []).append(str(upload.prediction_id))
    return kept


def _judge(
    config: ExperimentConfig,
    base: _Base,
    wanted: Sequence[LabelledUpload],
    files: Mapping[str, Path],
    home: Path,
    spare_bytes: int | None,
) -> tuple[SourceVerdict, ...]:
    """Judges the sources of labels that the base does not have, by all of their labels."""
    asked = {
        upload.source
        for upload in wanted
        if (image := base.grown.get(upload.sha256)) is None or image.labels != upload.labels
    }
    if not asked:
        return ()
    embeddings = embed_dataset(base.checkout, config.encoder, home=home, spare_bytes=spare_bytes)
    own = base.compared()[:_MOST_COMPARED]
    # Those that it has grown by come first in `wanted`, and have vectors.
    there = [*own, *(base.grown[upload.sha256] for upload in wanted if upload.sha256 in base.grown)]
    parts = [read_embeddings(embeddings, base.checkout.manifest, [image.path for image in there])]
    if new := [upload.sha256 for upload in wanted if upload.sha256 not in base.grown]:
        rows = pd.DataFrame({"path": [str(files[sha256]) for sha256 in new], "sha256": new})
        # Vectors are kept of what becomes a version; a deletion is to reach all of the rest.
        with TemporaryDirectory(prefix="cv-labels-") as folder:
            encoder = open_encoder(config.encoder, home, config.model.sample_bits)
            parts.append(embed_images(rows, Origin(Path("/")).files, encoder, Path(folder)))
    vectors = np.concatenate(parts).astype(np.float32)
    labels = [*(image.labels for image in own), *(upload.labels for upload in wanted)]
    unknown = [*(image.unknown_labels for image in own), *[()] * len(wanted)]
    sources = [*[None] * len(own), *(upload.source if upload.source in asked else None for upload in wanted)]
    usable = np.flatnonzero(np.isfinite(vectors).all(axis=1)).tolist()
    verdicts = judge_sources(
        vectors[usable],
        [labels[at] for at in usable],
        [sources[at] for at in usable],
        unknown=[unknown[at] for at in usable],
        class_names=config.model.classes,
        classifier_type=config.model.classifier_type,
        max_wrong_fraction=config.labels.max_wrong_fraction,
    )
    return tuple(_by_prediction(verdict, usable, len(own)) for verdict in verdicts)


def _by_prediction(verdict: SourceVerdict, usable: Sequence[int], own: int) -> SourceVerdict:
    examples = tuple((usable[at] - own, name) for at, name in verdict.examples)
    return SourceVerdict(**{**vars(verdict), "examples": examples})


def _refuse_suspects(
    config: ExperimentConfig,
    sources: Sequence[SourceVerdict],
    wanted: Sequence[LabelledUpload],
    trusted: Collection[str],
) -> None:
    suspects = [v for v in sources if v.is_suspect(len(sources))]
    suspects = [verdict for verdict in suspects if verdict.source not in trusted]
    if not suspects:
        return
    lines: list[str] = []  # Sentences, as Dagster's page shows them without their line breaks.
    for verdict in suspects:
        examples = [
            f"    prediction {of.prediction_id}: labelled {LABEL_SEPARATOR.join(of.labels)}, looks like {name}"
            for of, name in ((wanted[at], name) for at, name in verdict.examples[:5])
        ]
        lines += [f"  {_told(verdict)}. For example:", ";\n".join(examples) + "."]
    named = " ".join(f"--without {verdict.source!r}" for verdict in suspects)
    raise SuspectLabelsError(
        "Expected labels that fit what the other images show. Received:\n" + "\n".join(lines) + "\n"
        f"Nothing was changed. Look at these predictions, then leave the labels out ({named}), or, where they are "
        "right and the images of a new kind, take them by --trust instead.",
        tuple(verdict.source for verdict in suspects),
    )


def _placed(
    config: ExperimentConfig, base: _Base, wanted: Sequence[LabelledUpload], files: Mapping[str, Path]
) -> list[_Added]:
    """Gives each upload its split and place: those that it had, or new ones."""
    split_of = {sha256: image.split for sha256, image in base.grown.items()}
    new = [upload for upload in wanted if upload.sha256 not in split_of]
    dealt = deal_additions(
        [upload.sha256 for upload in new],
        [upload.labels for upload in new],
        [(image.split, image.labels) for image in (*base.own, *base.grown.values())],
        seed=config.dataset.split_seed,
    )
    split_of |= {upload.sha256: split for upload, split in zip(new, dealt, strict=True)}
    placed: list[_Added] = []
    for upload in wanted:
        file, split = files[upload.sha256], split_of[upload.sha256]
        name = f"labelled-{upload.prediction_id}{file.suffix}"
        folder = f"{split}/{upload.labels[0]}" if base.layout.labels_from == "folders" else "labelled"
        values = (
            *(f"{folder}/{name}", upload.sha256, split, LABEL_SEPARATOR.join(upload.labels)),
            *(str(upload.prediction_id), upload.source, upload.stated_on.isoformat(), upload.received_on.isoformat()),
            *(upload.model_version, upload.predicted_class),
        )
        placed.append(_Added(dict(zip(PROVENANCE_COLUMNS, values, strict=True)), upload.labels, file))
    return placed


def _kept(base: _Base, repository: Path, expired: Sequence[_Image]) -> list[_Added]:
    """Returns images that stay as they are, with what an earlier version said of them."""
    content = read_file(repository, base.stored.tag, PROVENANCE) or b""
    told = {row["sha256"]: row for row in csv.DictReader(io.StringIO(content.decode()))}
    kept: list[_Added] = []
    for image in expired:
        path, sha256, split, label = _key(image)
        values = {
            **dict.fromkeys(PROVENANCE_COLUMNS, ""),
            **told.get(image.sha256, {}),
            "path": path,
            "sha256": sha256,
            "split": split,
            "label": label,
            "prediction_id": str(image.grown_by),
        }
        kept.append(_Added(values, image.labels, base.checkout.directory / image.path))
    return kept


def _key(image: _Image) -> tuple[str, ...]:
    return (image.place, image.sha256, image.split, LABEL_SEPARATOR.join(image.labels))


def _changes(base: _Base, after: Sequence[_Added], departures: Counter[str]) -> tuple[str, ...]:
    before = {sha256: image.labels for sha256, image in base.grown.items()}
    added = [image for image in after if image.row["sha256"] not in before]
    relabelled = [image for image in after if before.get(image.row["sha256"], image.labels) != image.labels]
    lines = [f"{len(added)} images added, {len(relabelled)} relabelled, {departures.total()} left."]
    if added:
        by_split = Counter(image.row["split"] for image in added)
        by_class = Counter(name for image in added for name in image.labels)
        lines.append("added to " + ", ".join(f"{split} {by_split[split]}" for split in SPLITS if by_split[split]))
        lines.append("added of " + ", ".join(f"{name} {count}" for name, count in sorted(by_class.items())))
    reasons = {
        "deleted": "their prediction was deleted",
        "expired": "the log does not keep their upload any more (labels.keep_expired)",
        "kept": "they have no label any more, or no agreed one",
    }
    lines += [f"left: {count}, as {reasons[fate]}" for fate, count in sorted(departures.items())]
    return tuple(lines)


def _told(verdict: SourceVerdict) -> str:
    return (
        f"{verdict.source}: {verdict.contradicted} of {verdict.labels} labels contradict the other images, where "
        f"{verdict.expected:.1f} would by chance; about {verdict.wrong_fraction:.0%} are wrong "
        f"(p = {verdict.p_value:.2g})"
    )


def _digest(after: Sequence[_Added]) -> str:
    return hashlib.sha256(repr(sorted(image.key for image in after)).encode()).hexdigest()[:8]


def _store(repository: Path, tag: str, base: _Base, after: Sequence[_Added], summary: Sequence[str]) -> StoredVersion:
    root = base.checkout.directory
    by_folder = base.layout.labels_from == "folders"
    given = {entry.path: entry.split for entry in base.layout.entries}
    entries: list[SuccessorImage] = []
    for image in base.own:
        place = image.place
        if by_folder and given[place] != image.split:  # The manifest's split becomes the version's own.
            place = f"{image.split}/{image.labels[0]}/{PurePosixPath(place).name}"
        entry = ImageEntry(place, image.split, image.labels, image.group, image.unknown_labels)
        entries.append(SuccessorImage(root / image.path, entry))
    entries += [
        SuccessorImage(image.file, ImageEntry(image.row["path"], image.row["split"], image.labels)) for image in after
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, PROVENANCE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted((image.row for image in after), key=lambda row: row["path"]))
    stored = base.stored
    message = "\n".join(
        [f"Grow {stored.tag} to {tag}", "", *summary, f"base: {stored.tag}, {stored.dvc_md5}, commit {stored.commit}"]
    )
    return store_successor(
        repository, tag, entries, message, before=base.layout, beside={PROVENANCE: text.getvalue().encode()}
    )
