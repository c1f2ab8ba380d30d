"""Training: a configuration in, a checkpoint out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import yaml

from speciesmap.config import AnyConfig, ClassifyConfig, FinetuneConfig, PretrainConfig
from speciesmap.datasets.paired import PairedDataset
from speciesmap.errors import ConfigError, OutputError
from speciesmap.learning.classify import classify
from speciesmap.learning.finetune import finetune
from speciesmap.learning.fit import STATE, process_rank
from speciesmap.learning.pretrain import pretrain
from speciesmap.learning.seen import NOTHING, sample_seen
from speciesmap.learning.sources import Sources, open_sources
from speciesmap.learning.validation import FOLDS
from speciesmap.models import read_facts, save_model
from speciesmap.outputs import refuse_existing, replacing
from speciesmap.rasters.messages import without_credentials

log = logging.getLogger("speciesmap")


def train(
    config: AnyConfig,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run one training stage.

    The work lies in a hidden folder beside `out` until it is done, with logs, and what is needed
    to go on after an interruption.

    Args:
        config: What to do; see `load_config`.
        out: Folder for the checkpoint, or for the tables of stage `classify`.
        resume: Go on with an interrupted run of the same configuration.
        overwrite: Replace an existing output, or an interrupted run.

    Returns:
        The folder.

    Raises:
        SpeciesmapError: The configuration, its data or the output do not allow it.
    """
    if isinstance(config, ClassifyConfig):
        if resume:
            raise ConfigError("stage classify keeps nothing to go on from; leave --resume out")
        return classify(config, out, overwrite=overwrite)
    out = Path(out)
    first = process_rank() == 0  # further processes of a run only train
    start = surveys = None
    if isinstance(config, FinetuneConfig):
        start, surveys = config.init, config.validation.surveys if config.validation else None
    elif config.method == "cve_mae":
        start = config.crossview.aerial_init
    if first:
        refuse_existing(out, overwrite, *config.data.inputs, start, surveys)
    work = unfinished(out)
    recorded = without_credentials(config.model_dump(mode="json"))
    described = yaml.safe_dump(recorded, sort_keys=False)
    if first:
        begin(work, described, resume, overwrite)

    L.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    try:
        sources = open_sources(config.data)
        if first:
            refuse_other_data(work, config, sources)
        before = NOTHING if start is None else read_facts(start)  # which may be gone in the end
        origin = {
            "seen": sample_seen(config, sources, before),
            "initial": before.get("fingerprint"),
        }
        if isinstance(config, PretrainConfig):
            model, metrics = pretrain(config, sources, work)
        else:
            model, metrics = finetune(config, sources, before, work)
    except BaseException:
        if first and not (work / STATE).exists() and not (work / FOLDS).exists():
            shutil.rmtree(work)  # nothing to go on from
        raise
    if not first:
        return out
    facts = {
        "training": recorded,
        **origin,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__, "lightning": L.__version__},
    }
    with replacing(out, overwrite=overwrite) as folder:
        save_model(model, folder, facts)
        (folder / "config.yaml").write_text(described)
        for kept in ("logs", "folds.parquet"):
            if (work / kept).exists():
                (work / kept).rename(folder / kept)
    shutil.rmtree(work)
    log.info(told(metrics))
    return out


def begin(work: Path, described: str, resume: bool, overwrite: bool) -> None:
    """Make the folder of a run, or check that of the interrupted one that is to go on.

    Args:
        work: The folder.
        described: The configuration.
        resume: Go on.
        overwrite: Start anew, unless it is to go on.

    Raises:
        OutputError: An interrupted run lies there, and neither is said.
        ConfigError: It had another configuration.
    """
    if work.exists() and not resume:
        if not overwrite:
            raise OutputError(
                f"an interrupted run lies in {work}; pass --resume to go on, or --overwrite to "
                "start anew"
            )
        shutil.rmtree(work)
    if work.exists() and (work / "config.yaml").read_text() != described:
        raise ConfigError(
            f"the interrupted run in {work} had another configuration; pass --overwrite to start "
            "anew, or the configuration in its config.yaml"
        )
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.yaml").write_text(described)


def told(metrics: Mapping[str, Any]) -> str:
    """Say in one line how good a model is, or how far its training came where nothing judged it."""
    judged = {
        name: found
        for name, found in metrics.get("validation", {}).items()
        if found["auc"] is not None
    }
    if judged:
        mean = float(np.mean([found["auc"] for found in judged.values()]))
        several = len(judged) > 1
        of = f"mean of {len(judged)} taxa" if several else next(iter(judged))
        dark = sum(found["informative"] is False for found in judged.values())
        if dark:
            of += f"; {dark} of them uninformative" if several else "; uninformative"
        return f"validation on held-out folds: AUC {mean:.2f} ({of})"
    if "losses" in metrics:
        return f"training: loss {metrics['losses']['loss']:.3g} after {metrics['steps']} steps"
    return "training: heads at their optimum"


def refuse_other_data(
    work: Path, config: PretrainConfig | FinetuneConfig, sources: Sources
) -> None:
    """Keep what tells a run's data apart in its folder, and stop where it was kept of others.

    It is that of rasters, the bytes of tables and of the initial model, and of a data set the names
    and places of its rows and the sizes of its files.

    Raises:
        ConfigError: Of the interrupted run something of the same name was another.
    """
    found = dict(_digests(config, sources))
    kept = work / "data.json"
    before = json.loads(kept.read_text()) if kept.exists() else found
    changed = [name for name in found if found[name] != before.get(name, found[name])]
    if changed:
        raise ConfigError(
            f"the interrupted run in {work} had another {' and '.join(changed)} than lies there "
            "now; pass --overwrite to start anew, or put back what it had"
        )
    with replacing(kept, overwrite=True) as file:
        file.write_text(json.dumps(found))


def _digests(
    config: PretrainConfig | FinetuneConfig, sources: Sources
) -> Iterator[tuple[str, str]]:
    """What tells apart whatever a configuration names, by its key."""
    data, dataset = config.data, sources.dataset
    if dataset is not None:
        told = dataset.facts[["name", "latitude", "longitude"]]
        rows = pd.util.hash_pandas_object(told, index=False).to_numpy().tobytes()
        files = dataset.files.files if isinstance(dataset, PairedDataset) else []
        sizes = [file.stat().st_size for file in files if isinstance(file, Path)]
        yield "data.dataset", hashlib.sha256(rows + repr(sizes).encode()).hexdigest()
    if sources.imagery is not None:
        yield "data.imagery", sources.imagery.fingerprint
    if sources.bias is not None:
        yield "data.bias", sources.bias.fingerprint
    if sources.covariates is not None:
        yield "data.covariates", sources.covariates.fingerprint
    named = {"data.background": data.background, "data.target_group": data.target_group}
    if isinstance(config, FinetuneConfig):
        named["init"] = config.init
        named["validation.surveys"] = config.validation.surveys if config.validation else None
    else:
        named["crossview.aerial_init"] = config.crossview.aerial_init
    for name, path in named.items():
        if isinstance(path, str):
            digest = hashlib.sha256()
            with suppress(OSError, ValueError):  # whoever needs it says why it cannot be read
                for file in sorted([Path(path), *Path(path).rglob("*")]):
                    if file.is_file():
                        with file.open("rb") as content:
                            digest.update(hashlib.file_digest(content, "sha256").digest())
            yield name, digest.hexdigest()


def unfinished(out: Path) -> Path:
    """Folder beside an output where a run keeps what it needs to go on, until it is done."""
    return out.with_name(f".{out.name}.training")
