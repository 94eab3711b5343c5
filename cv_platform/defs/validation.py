"""The asset `validation_report` and its checks; a failed blocking check stops everything downstream."""

from typing import Any

import dagster as dg

from cv_platform.defs.branch import Branch
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.versions import Reads
from cv_platform.records import CheckOutcome, DatasetVersion, Embeddings, ValidationVerdict
from cv_platform.validation.verdict import SEVERITY_FIELDS


def validation_report_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/validation_report`."""
    severities = branch.config.validation.model_dump()
    specs = [
        branch.check(
            name,
            "validation_report",
            blocking=severities[field] == "error",
            description=name.replace("_", " ").capitalize() + ".",
        )
        for name, field in SEVERITY_FIELDS.items()
        if severities[field] != "off"
    ]

    @branch.asset(
        value=ValidationVerdict,
        kinds={"deepchecks"},
        reads=Reads(["validate"], code=["cv_platform/validation/checks"]),
        ins={"dataset": "dataset", "embeddings": "embeddings"},
        checks=specs,
    )
    def validation_report(
        context: dg.AssetExecutionContext, dataset: DatasetVersion, embeddings: Embeddings
    ) -> dg.MaterializeResult:
        """The verdict about one dataset version, with Deepchecks' reports as HTML.

        What takes no part is named with its reason (`quarantine.html`). Training refuses a version whose latest
        verdict failed, in later runs too.
        """
        from cv_platform.validation.validate import validate_dataset

        run = branch.run(context)
        model = run.config.model
        verdict = validate_dataset(
            dataset,
            run.config.validation,
            class_names=model.classes,
            classifier_type=model.classifier_type,
            home=run.settings.home,
            embeddings=embeddings,
            recipe=run.code_version,
        )
        outcomes = {outcome.name: outcome for outcome in verdict.outcomes}
        checks = [check_result(spec.name, outcomes.get(spec.name)) for spec in specs]
        return run.result(verdict, _metadata(verdict), checks)

    return validation_report


def _metadata(verdict: ValidationVerdict) -> dict[str, Any]:
    from cv_platform.validation.validate import PAGES

    pages = [page for name in PAGES.values() if (page := verdict.directory / name).exists()]
    shown = {"name", "passed", "severity", "summary"}
    return {
        "passed": verdict.passed,
        "report": file_link(verdict.report_path),
        **{page.stem: file_link(page) for page in pages},
        "quarantined": table([{"image": path} for path in verdict.quarantined[:100]]),
        "checks": table([outcome.model_dump(include=shown) for outcome in verdict.outcomes]),
    }


def check_result(name: str, outcome: CheckOutcome | None) -> dg.AssetCheckResult:
    """Returns what the page shows of a check; without an outcome, the run's config has switched it off."""
    if outcome is None:
        warn = dg.AssetCheckSeverity.WARN
        return dg.AssetCheckResult(check_name=name, passed=True, severity=warn, description="Switched off in this run.")
    # Numbers are plotted over time.
    shown = {"measured": outcome.value, "limit": outcome.limit}
    offenders = {"offenders": table([{"offender": one} for one in outcome.offenders[:50]])} if outcome.offenders else {}
    return dg.AssetCheckResult(
        check_name=name,
        passed=outcome.passed,
        severity=dg.AssetCheckSeverity.WARN if outcome.severity == "warn" else dg.AssetCheckSeverity.ERROR,
        description=outcome.finding(),
        metadata={name: value for name, value in shown.items() if value is not None} | offenders,
    )
