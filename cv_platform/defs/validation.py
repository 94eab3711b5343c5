"""The asset `validation_report` and its checks; a failed blocking check stops everything downstream."""

import dagster as dg

from cv_platform.datasets.versions import DatasetVersion
from cv_platform.defs.branch import Branch
from cv_platform.defs.metadata import file_link, table
from cv_platform.validation.verdict import CHECK_NAMES, ValidationVerdict


def validation_report_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/validation_report`."""
    severities = branch.config.validation.model_dump()
    specs = [
        branch.check(
            name,
            "validation_report",
            blocking=severities[name] == "error",
            description=name.replace("_", " ").capitalize() + ".",
        )
        for name in CHECK_NAMES
        if severities[name] != "off"
    ]

    @branch.asset(
        value=ValidationVerdict,
        kinds={"deepchecks"},
        sections=["validate", "dataset", "model"],
        ins={"dataset": "dataset"},
        checks=specs,
    )
    def validation_report(context: dg.AssetExecutionContext, dataset: DatasetVersion) -> dg.MaterializeResult:
        """The verdict about one dataset version, with Deepchecks' reports as HTML.

        Unreadable images are quarantined by name. Training refuses a version whose latest verdict failed,
        in later runs too.
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
        )
        outcomes = {outcome.name: outcome for outcome in verdict.outcomes}
        return dg.MaterializeResult(
            value=verdict,
            metadata={
                "passed": verdict.passed,
                "report": file_link(verdict.report_path),
                "quarantined": table([{"image": path} for path in verdict.quarantined[:100]]),
                "checks": table(
                    [o.model_dump(include={"name", "passed", "severity", "summary"}) for o in verdict.outcomes]
                ),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name=spec.name,
                    passed=outcomes[spec.name].passed if spec.name in outcomes else True,
                    severity=dg.AssetCheckSeverity.WARN
                    if spec.name not in outcomes or outcomes[spec.name].severity == "warn"
                    else dg.AssetCheckSeverity.ERROR,
                    description=outcomes[spec.name].finding() if spec.name in outcomes else "Switched off in this run.",
                    metadata={"offenders": table([{"image": path} for path in outcomes[spec.name].offenders[:50]])}
                    if spec.name in outcomes
                    else {},
                )
                for spec in specs
            ],
        )

    return validation_report
