"""speciesmap train."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path

import click

from speciesmap.cli import options


@click.command()
@click.argument("config", type=options.PATH, metavar="CONFIG")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key of the configuration, for example optim.lr=0.0003; may be repeated.",
)
@click.option(
    "--covariates",
    multiple=True,
    metavar="[NAME=]RASTER",
    help="Environmental raster beside imagery, for stage finetune; may be repeated.",
)
@click.option("--location", is_flag=True, help="Easting and northing as covariates.")
@options.out_option("RUN", "Folder for the checkpoint.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@options.overwrite_option
@options.json_option
@options.logging_options
def command(
    config: Path,
    changes: tuple[str, ...],
    covariates: tuple[str, ...],
    location: bool,
    out: Path,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Pre-train or fine-tune as CONFIG says, and write a checkpoint.

    CONFIG is a YAML file, or the name of one that comes with speciesmap, such as `crisp`.

    Stage `pretrain` learns a joint space of aerial windows, ground photos and names (method crisp)
    or features from imagery alone (method mae). Stage `finetune` learns embeddings of taxa from
    presences against background. Stage `classify` compares how well photos, windows and both name
    taxa, with few labels and many, and writes one table. Paths in the configuration are relative
    to where you are.

    \b
    Example:
      speciesmap train demo_crisp --set data.dataset=chips --out runs/pretrained
    """
    from speciesmap.config import ClassifyConfig, load_config
    from speciesmap.learning.fit import process_rank
    from speciesmap.learning.train import train, unfinished
    from speciesmap.models import read_facts

    if covariates:
        changes = (*changes, f"data.covariates={json.dumps(covariates)}")
    if location:
        changes = (*changes, "data.location=true")
    stage = load_config(config, changes)
    try:
        path = train(stage, out, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        if not process_rank():
            words = ["speciesmap", "train", str(config), "--out", str(out)]
            words += [word for change in changes for word in ("--set", change)]
            words += ["--overwrite"] * overwrite
            kept = unfinished(out).exists()
            words += ["--resume"] * kept
            told = "go on where it was last saved" if kept else "nothing was saved; start again"
            click.echo(f"interrupted: {told} with `{shlex.join(words)}`", err=True)
        sys.exit(128 + signal.SIGINT)
    if process_rank():
        return  # the first process writes the checkpoint, and tells
    if isinstance(stage, ClassifyConfig):
        from speciesmap.learning.classify import read_results

        options.print_result(path, as_json, **read_results(path))
        return
    options.print_result(path, as_json, metrics=read_facts(path)["metrics"])
