"""The whole way from a model and its data to a report that a sceptic can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from speciesmap import __version__, outputs
from speciesmap.config import FinetuneConfig, ValidationConfig, load_config
from speciesmap.errors import ConfigError, ModelError
from speciesmap.evaluation.ladder import climb
from speciesmap.learning.seen import share_seen
from speciesmap.learning.sources import Sources, open_sources
from speciesmap.models import SpeciesModel, load_model, read_facts
from speciesmap.present.odmap import protocol, write_protocol
from speciesmap.present.report import write_report


@dataclass(frozen=True)
class Appraisal:
    """A folder with an evaluation.

    Attributes:
        path: Of the folder.
        html: The report.
        json: All its figures.
        odmap: The protocol, as CSV.
        result: What the JSON holds.
    """

    path: Path
    html: Path
    json: Path
    odmap: Path
    result: dict[str, Any]


def evaluate(
    model: Path | str,
    *,
    data: Path | str,
    out: Path | str,
    covariates: Sequence[Path | str] = (),
    surveys: Path | str | None = None,
    overwrite: bool = False,
) -> Appraisal:
    """Evaluate a model beside simpler methods, on identical spatial folds.

    Args:
        model: Folder that `speciesmap train` wrote.
        data: A paired data set, evaluated with the imagery and folds that the model was
            fine-tuned with; or a fine-tuning configuration, a YAML file.
        out: Folder to create, with `report.html`, `report.json` and `odmap.csv`.
        covariates: Rasters of environmental variables, as `FILE` or `NAME=FILE`; those of the
            configuration by default.
        surveys: Table of presence and absence; that of the configuration by default.
        overwrite: Replace the folder.

    Returns:
        The files and the figures.

    Raises:
        SpeciesmapError: An input is missing or does not fit; nothing is left of the folder.
    """
    out, folder = Path(out), Path(model)
    facts = read_facts(folder)
    config = _configuration(facts, data)
    assert config.validation is not None
    given = {"covariates": [str(path) for path in covariates]} if covariates else {}
    wanted = config.data.model_copy(update=given)
    asked = surveys if surveys is not None else config.validation.surveys
    outputs.refuse_existing(out, overwrite, folder, config.init, data, asked, *wanted.inputs)
    loaded, sources = load_model(folder), open_sources(wanted)
    encoder, note, warning = _encoder(loaded, facts, sources)
    result: dict[str, Any] = {
        "speciesmap": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "model": {"name": folder.name, "path": str(folder), "fingerprint": loaded.fingerprint},
        "encoder": {"note": note, "fingerprint": encoder.fingerprint},
        "configuration": config.model_dump(mode="json"),
        "covariates": [str(path) for path in covariates or config.data.covariates],
        "folding": _folding(config.validation),
        "notes": warning,
        **climb(loaded, encoder, config, sources, asked),
    }
    if asked is not None and str(asked) == config.validation.surveys and loaded.prevalence:
        result["notes"].append(
            "The surveys calibrated the model too: the figures at surveyed sites are not "
            "independent of it."
        )
    with outputs.replacing(out, overwrite=overwrite) as beside:
        beside.mkdir()
        table = protocol(_known(result, loaded))
        write_protocol(table, beside / "odmap.csv")
        write_report(result, table, beside / "report.html")
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str)
        (beside / "report.json").write_text(text + "\n", encoding="utf-8")
    return Appraisal(out, out / "report.html", out / "report.json", out / "odmap.csv", result)


def _configuration(facts: dict[str, Any], data: Path | str) -> FinetuneConfig:
    """The configuration given, or that of the model with another data set."""
    if Path(data).suffix.lower() in {".yaml", ".yml"}:
        config = load_config(data)
    else:
        trained = facts.get("training", {})
        if trained.get("stage") != "finetune":
            raise ConfigError(
                f"{data} alone says neither imagery nor folds, and the model was not fine-tuned; "
                "give --data a fine-tuning configuration (YAML)"
            )
        config = load_config(trained, [f"data.dataset={data}"])
    if not isinstance(config, FinetuneConfig) or config.validation is None:
        raise ConfigError(
            f"evaluation with {data} needs spatial folds; give --data a configuration of stage "
            "finetune with validation: {folds: 5, block_m: ...}"
        )
    return config


def _folding(chosen: ValidationConfig) -> str:
    return {
        "blocks": f"spatial blocks of {chosen.block_m or 0:g} m",
        "kmeans": "k-means regions",
        "knndm": "as far from training as the imagery is from the records",
    }[chosen.method]


def _encoder(
    model: SpeciesModel, facts: dict[str, Any], sources: Sources
) -> tuple[SpeciesModel, str, list[str]]:
    """Whose embeddings the ladder stands on, in words, and what to keep in mind."""
    trained = facts.get("training", {})
    folder: Path | None = None
    if trained.get("stage") == "finetune" and not trained.get("freeze_encoder"):
        folder = Path(trained["init"])
        lacking, initial = "", facts.get("initial")
        try:
            before, facts = load_model(folder), read_facts(folder)
        except ModelError:
            lacking = "is not at hand"
        else:
            if initial not in (None, before.fingerprint):
                lacking = "is another now"
        if lacking:
            told = (
                f"The checkpoint {folder} that the model was fine-tuned from {lacking}. The "
                "encoder has seen the held-out records, so rungs on embeddings are too good."
            )
            return model, "the fine-tuned model", [told]
        model = before
    notes = []
    if folder is not None:
        notes.append(
            "Embeddings are those before fine-tuning. The fine-tuned encoder's own "
            "cross-validation is in folds.parquet of the model."
        )
    share = share_seen(facts, sources)
    if share != 0:
        notes.append(
            f"Pre-training paired windows of {100 * share:.3g}% of these records with their photos "
            "or names, those held out here among them: rungs on embeddings, and most of all "
            "queries by text and photo, are a little too good."
            if share
            else "Pre-training may have paired windows of these records with their photos or "
            "names: rungs on embeddings, and most of all queries by text and photo, may be a "
            "little too good."
        )
    note = "the model itself" if folder is None else f"{folder.name}, before fine-tuning"
    return model, note, notes


def _known(result: dict[str, Any], model: SpeciesModel) -> dict[tuple[str, str, str], str]:
    """What a run can say of the ODMAP protocol's elements."""
    config, own = result["configuration"], result["rungs"][result["head"]]["mean"]
    data, a = config["data"], model.architecture
    taxa = ", ".join(result["taxa"])
    sizes = "; ".join(f"{name}: {f['presences']}" for name, f in result["taxa"].items())
    resolution = f"{a.resolution_m:g} m pixels, windows of {a.window_px} px"
    folds = (
        f"{len(result['folds'])} folds, {result['folding']}; training windows that overlap a "
        "held-out window are left out"
    )
    scores = "; ".join(f"{name} {value:.3f}" for name, value in own.items() if value is not None)
    trust = model.trust
    covariates = "; ".join(result["covariates"])
    overview: dict[tuple[str, str], str] = {
        ("Model objective", "Target output"): "probability of presence"
        if model.prevalence
        else "relative suitability in [0, 1]",
        ("Focal taxon", "Focal taxon"): taxa,
        ("Scale of analysis", "Spatial resolution"): resolution,
        ("Biodiversity data", "Observation type"): "occurrence records",
        ("Biodiversity data", "Response data type"): "presence against background",
        ("Predictors", "Predictor types"): "aerial imagery"
        + ("; environmental covariates" if covariates else ""),
        ("Algorithms", "Modelling techniques"): "; ".join(result["rungs"]),
        ("Algorithms", "Model complexity"): f"encoder {a.aerial['backbone']}, {a.dim} dimensions; "
        "linear heads with an L2 penalty chosen within the training folds",
        ("Workflow", "Model workflow"): "pre-training, fine-tuning, spatial cross-validation, "
        "calibration where prevalence or surveys are given, mapping",
        ("Software", "Software"): f"speciesmap {result['speciesmap']}",
    }
    body: dict[tuple[str, str, str], str] = {
        ("Data", "Biodiversity data", "Taxon names"): taxa,
        ("Data", "Biodiversity data", "Ecological level"): "species",
        ("Data", "Biodiversity data", "Data sources"): str(data["dataset"]),
        ("Data", "Biodiversity data", "Sample size"): sizes,
        ("Data", "Biodiversity data", "Background data"): f"{result['background']} places, "
        "random over the imagery; target group: "
        + str(data["target_group"] or "records of the other taxa"),
        ("Data", "Data partitioning", "Training data"): folds,
        ("Data", "Data partitioning", "Validation data"): "penalties chosen on the folds that are "
        "trained on; thresholds on the other folds' held-out scores",
        ("Data", "Data partitioning", "Test data"): "surveyed sites"
        if "surveys" in result
        else "none beside the held-out folds",
        ("Data", "Predictor variables", "Predictor variables"): ", ".join(a.bands)
        + (f"; {covariates}" if covariates else ""),
        ("Data", "Predictor variables", "Data sources"): str(data["imagery"]),
        ("Data", "Predictor variables", "Spatial resolution"): resolution,
        ("Data", "Predictor variables", "Dimension reduction"): f"encoder to {a.dim} dimensions",
        ("Model", "Model settings", "Model settings (fitting)"): "assume-negative loss, L-BFGS; "
        f"seed {config['seed']}",
        ("Model", "Model settings", "Model settings (extrapolation)"): "embeddings are not clamped"
        + ("; covariates are, to the range trained on" if covariates or data["location"] else "")
        + ("; area of applicability masked" if trust and trust.applicability else ""),
        ("Model", "Model selection, averaging, ensembles", "Model selection"): "penalty by AUC "
        "within the training folds",
        ("Model", "Non-independence", "Spatial autocorrelation"): folds,
        ("Assessment", "Performance statistics", "Performance on validation data"): scores,
    }
    if trust is not None:
        rules = {rule for bounds in trust.thresholds.values() for rule in bounds}
        body |= {
            ("Model", "Threshold selection", "Threshold selection"): "; ".join(sorted(rules)),
            ("Prediction", "Uncertainty quantification", "Parameter uncertainty"): "standard "
            f"deviation over {trust.weight.shape[1]} heads fitted to parts of the data",
        }
        if trust.applicability is not None:
            novel = f"dissimilarity index above {trust.applicability.threshold:.3f}"
            body[("Data", "Transfer data", "Quantification of novelty")] = novel
            body[("Prediction", "Uncertainty quantification", "Novel environments")] = (
                f"{novel} is outside the area of applicability (Meyer & Pebesma 2021)"
            )
    body[("Prediction", "Prediction output", "Prediction unit")] = overview[
        "Model objective", "Target output"
    ]
    if "surveys" in result:
        found = result["surveys"]["taxa"]
        body[("Assessment", "Performance statistics", "Performance on test data")] = "; ".join(
            f"{name}: AUC {m['auc']:.3f}" for name, m in found.items() if m["auc"] is not None
        )
    return {("Overview", *key): value for key, value in overview.items()} | body
