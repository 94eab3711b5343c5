"""Assets of the images: `dataset` (a version, checked out), `embeddings` (what they show), `packed_images` (pixels)."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from cv_platform.defs.branch import AssetRun, Branch, checked
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.observed import observation, repository_key
from cv_platform.defs.versions import Reads
from cv_platform.record_store import RecordStore
from cv_platform.records import DatasetVersion, Embeddings, PackedImages, ValidationVerdict

if TYPE_CHECKING:  # The code location has no need of DVC's module.
    from cv_platform.datasets.publishing import Sharing


def dataset_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/dataset`."""
    repository = repository_key(branch.config.name)

    @branch.asset(
        value=DatasetVersion,
        is_retried=True,
        kinds={"dvc", "git", "parquet"},
        reads=Reads(
            [
                *(f"dataset.{split}_fraction" for split in ("valid", "reference", "test")),
                *("dataset.split_seed", "dataset.max_image_pixels", "dataset.quarantine"),
                *("model.classes", "model.classifier_type", "model.sample_bits"),
            ],
            source=["dataset.ds_name", "dataset.dvc_tag", "dataset.ds_root", "dataset.source"],
        ),
        observes=[repository],
    )
    def dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """A read-only checkout of the DVC version, with a manifest.

        The manifest has a row per image: path, sha256, split (train, valid, test, reference), labels, group, size
        and what is odd about it. The data version is DVC's md5, so the same images leave everything downstream fresh.
        """
        from cv_platform.datasets.versions import checkout_version

        run = branch.run(context)
        previous = RecordStore(run.settings.home, run.config.name).latest(DatasetVersion)
        version = checkout_version(
            run.config.dataset,
            run.config.model,
            home=run.settings.home,
            engine=run.engine,
            shared_in=run.shared_in,
        )
        md5 = version.provenance.dvc_md5
        context.log_event(observation(repository, md5, {"tag": version.provenance.dvc_tag, "dvc_md5": md5}))
        metadata = {**_contents(version), **_changes(run, previous, version)}
        return run.result(version, metadata, read={repository: md5})

    return dataset


def _contents(version: DatasetVersion) -> dict[str, Any]:
    from cv_platform.datasets.contact_sheet import keep_contact_sheet
    from cv_platform.datasets.manifest import count_manifest

    found = count_manifest(version.manifest_path)
    return {
        "dagster/row_count": found.images,
        "tag": version.provenance.dvc_tag,
        "dvc_md5": version.provenance.dvc_md5,
        "git_commit": version.git_commit,
        "directory": file_link(version.directory),
        "manifest": file_link(version.manifest_path),
        "unreadable": found.unreadable,
        "quarantined": table([{"kind": k, "images": n, "example": found.examples[k]} for k, n in found.kinds.items()]),
        "splits": table([{"split": s, "images": n} for s, n in found.splits.items()]),
        "classes": table(_rows(found.classes)),
        **({"unknown_labels": table(_rows(found.unknown))} if found.unknown else {}),
        "split_origin": table([{"split": s, "origin": o} for s, o in found.origins.items()]),
        "contact_sheet": file_link(keep_contact_sheet(version)),
    }


def _rows(counts: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    return [{"class": name, **of_splits} for name, of_splits in counts.items()]


def embeddings_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/embeddings`."""

    @branch.asset(
        value=Embeddings, is_retried=True, kinds={"onnx", "parquet"}, reads=["encoder"], ins={"dataset": "dataset"}
    )
    def embeddings(context: dg.AssetExecutionContext, dataset: DatasetVersion) -> dg.MaterializeResult:
        """A vector of the pretrained encoder per readable image: what it shows, for all that compares images.

        The file has path, sha256 and vector (float16), in the manifest's order. Images that an earlier version had are
        not computed again.
        """
        from cv_platform.datasets.embeddings import embed_dataset

        run = branch.run(context)
        made = embed_dataset(
            dataset,
            run.config.encoder,
            home=run.settings.home,
            spare_bytes=run.settings.spare_disk_bytes,
            engine=run.engine,
            sharing=_sharing(run),
        )
        figures = made.model_dump(include={"features", "encoder"})
        return run.result(made, {"dagster/row_count": made.images, "file": file_link(made.path), **figures})

    return embeddings


def _sharing(run: AssetRun) -> "Sharing | None":
    """Returns what the run shares its dataset's images and packs by."""
    from cv_platform.datasets.publishing import Sharing
    from cv_platform.datasets.versions import repository_directory

    if not run.shared_in:
        return None
    return Sharing(run.shared_in, repository_directory(run.config.dataset, home=run.settings.home))


def packed_images_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/packed_images`."""

    complete = branch.check(
        "every_readable_image_is_packed",
        "packed_images",
        blocking=True,
        description="Each split holds exactly the manifest's readable images.",
    )

    @branch.asset(
        value=PackedImages,
        is_retried=True,
        kinds={"numpy", "opencv"},
        reads=["model.input_size", "model.resize", "dataset.packed_uint8_bytes", "train.pack_scale"],
        ins={"dataset": "dataset", "verdict": "validation_report"},
        checks=[complete],
    )
    def packed_images(
        context: dg.AssetExecutionContext, dataset: DatasetVersion, verdict: ValidationVerdict
    ) -> dg.MaterializeResult:
        """Decoded and resized pixels per split: `(N, H, W, 3)` uint8 RGB, in the order of the paths.

        Made by the very function that the service calls on an upload, once per data version and preprocessing hash.
        Quarantined images are left out. Those of the training split may be larger than the model's input, see
        `train.pack_scale`.
        """
        from cv_platform.datasets.packing import pack_images
        from cv_platform.validation.verdict import require_verdict

        run = branch.run(context)
        require_verdict(verdict, dvc_md5=dataset.provenance.dvc_md5, manifest=dataset.manifest, must_pass=False)
        packed = pack_images(
            dataset,
            run.config.model,
            quarantined=verdict.quarantined,
            home=run.settings.home,
            spare_bytes=run.settings.spare_disk_bytes,
            uint8_budget_bytes=run.config.dataset.packed_uint8_bytes,
            engine=run.engine,
            pack_scale=run.config.train.pack_scale,
            sharing=_sharing(run),
        )
        expected, found = _usable(dataset, verdict), {split: n for split, n in packed.counts.items() if n}
        checks = checked(complete, expected == found, expected=expected, packed=found)
        return run.result(packed, _pack_metadata(packed), checks)

    return packed_images


def _pack_metadata(packed: PackedImages) -> dict[str, Any]:
    return {
        "dagster/row_count": sum(packed.counts.values()),
        "directory": file_link(packed.directory),
        **packed.model_dump(include={"bytes", "images_per_second"}),
        "preprocessing_hash": packed.task.preprocessing_hash,
        "splits": table([{"split": split, "images": count} for split, count in packed.counts.items()]),
    }


def _usable(dataset: DatasetVersion, verdict: ValidationVerdict) -> dict[str, int]:
    """Counts the images per split that are not quarantined."""
    from cv_platform.datasets.manifest import manifest_parts

    kept_out, counts = frozenset(verdict.quarantined), Counter[str]()
    for part in manifest_parts(dataset.manifest_path, ("path", "split")):
        rows = zip(part["path"].to_pylist(), part["split"].to_pylist(), strict=True)
        counts.update(split for path, split in rows if split is not None and path not in kept_out)
    return dict(counts)


def _changes(run: AssetRun, previous: DatasetVersion | None, version: DatasetVersion) -> dict[str, Any]:
    """Shows what another version than the last one has that the last had not."""
    from cv_platform.datasets.differences import changes_since
    from cv_platform.datasets.versions import repository_directory
    from cv_platform.files import write_file

    home = run.settings.home
    found = changes_since(previous, version, repository_directory(run.config.dataset, home=home), home)
    if found is None:
        return {}
    sheet = version.directory / f"changes-since-{found.before.replace('/', '-')}.png"
    write_file(sheet, found.draw(version.sample_bits))
    return {"changes": found.summary(), "changed_classes": table(found.by_class()), "changes_sheet": file_link(sheet)}
