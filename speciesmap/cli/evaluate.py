"""`speciesmap evaluate`: how good a model is, by what it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from speciesmap.cli.options import (
    PATH,
    PATH_OR_ADDRESS,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)


@click.command("evaluate")
@click.argument("model", type=PATH)
@click.option(
    "--data",
    type=PATH_OR_ADDRESS,
    required=True,
    metavar="DATASET|CONFIG",
    help="Paired data set or folder of birds, or a configuration (finetune or classify).",
)
@click.option(
    "--covariates",
    multiple=True,
    metavar="[NAME=]RASTER",
    help="Environmental, those of the configuration by default; repeatable.",
)
@click.option(
    "--surveys", type=PATH, metavar="FILE", help="Presence and absence: lon, lat, taxon, present."
)
@click.option(
    "--reranker", type=PATH, metavar="CVM-MAE", help="Of retrieval: scores the 50 best again."
)
@click.option(
    "--split",
    show_default="test",
    help="Of retrieval: which rows, where the data set says.",
)
@out_option("DIR", "Folder to create.")
@overwrite_option
@json_option
@logging_options
def command(
    model: Path,
    data: Path | str,
    covariates: tuple[str, ...],
    surveys: Path | None,
    reranker: Path | None,
    split: str | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Evaluate a model: of maps beside simpler methods, of photos and windows by what they find.

    MODEL is a folder that `speciesmap train` wrote. One that was fine-tuned for maps climbs a
    ladder on identical spatial folds: prevalence only, location only, MaxEnt with random and with
    target-group background (needs elapid), queries by text and by photo, embedding and head, with
    --covariates too; DIR gets report.html, report.json and an ODMAP protocol, odmap.csv. A data set
    is evaluated with the imagery and folds of the model's training.

    One that was pre-trained on photos and windows retrieves each from the other among the rows of a
    data set (retrieval.csv), or, with a configuration of stage classify, names taxa by a probe and
    by fine-tuning (classification.csv).

    \b
    Example:
      speciesmap evaluate runs/pretrained --data chips --out retrieval
      speciesmap evaluate runs/crisp --data configs/crisp_nmv_classify.yaml --out named
      speciesmap evaluate runs/model --data chips --covariates elevation.tif --out evaluation
      speciesmap evaluate runs/model --data configs/demo_landsat_finetune.yaml --out evaluation
    """
    from speciesmap.config import ClassifyConfig, load_config
    from speciesmap.models import read_facts

    config = load_config(data) if Path(data).suffix.lower() in {".yaml", ".yml"} else None
    if isinstance(config, ClassifyConfig):
        from speciesmap.learning.classify import classify, read_results

        _refuse(
            "to name taxa", covariates=covariates, surveys=surveys, reranker=reranker, split=split
        )
        asked = config.model_copy(update={"init": str(model)})
        path = classify(asked, out, overwrite=overwrite)
        print_result(path, as_json, **read_results(path))
        return
    trained = read_facts(model).get("training", {})
    if config is None and (reranker is not None or trained.get("stage") == "pretrain"):
        from speciesmap.evaluation.retrieval import evaluate_retrieval, read_retrieval

        _refuse("in retrieval", covariates=covariates, surveys=surveys)
        path = evaluate_retrieval(
            model, data, out, split=split or "test", reranker=reranker, overwrite=overwrite
        )
        print_result(path, as_json, **read_retrieval(path))
        return
    from speciesmap.appraise import evaluate

    _refuse("of maps", reranker=reranker, split=split)
    made = evaluate(
        model, data=data, out=out, covariates=covariates, surveys=surveys, overwrite=overwrite
    )
    print_result(made.path, as_json, html=made.html, odmap=made.odmap, report=made.result)


def _refuse(what: str, **given: Any) -> None:
    """Stop at options that this kind of evaluation does not read."""
    from speciesmap.errors import ConfigError

    for name, value in given.items():
        if value:
            raise ConfigError(f"--{name} is not read {what}; leave it out")
