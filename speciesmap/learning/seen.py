"""Which records a model has seen with their names: a sample of them, kept in its checkpoint.

The sample is of the smallest hashes, so that any two data sets choose alike, and the share of one
that is in the other can be told without either (k minimum values, Bar-Yossef et al. 2002).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from speciesmap.config import FinetuneConfig, PretrainConfig
from speciesmap.errors import ModelError
from speciesmap.learning.sources import Sources

NOTHING = {"seen": ""}  # facts of a start that has seen no records
KEPT = 4096  # hashes; of a million records that training saw, 1,000 share four
ENOUGH = 30  # records that, were a tenth of them seen, would hardly all be unseen: 0.9**30 is 4%


def sample_seen(
    config: PretrainConfig | FinetuneConfig, sources: Sources, before: Mapping[str, Any]
) -> str | None:
    """Sample what an encoder has seen after a stage.

    Masked images have no names, and heads on a frozen encoder leave none in it.

    Args:
        config: The stage.
        sources: Its data.
        before: Facts of the checkpoint that it starts from, which saw some too, or `NOTHING`.

    Returns:
        As checkpoints keep it; None where that checkpoint does not tell what it saw.

    Raises:
        ModelError: That checkpoint's sample is damaged.
    """
    seen = _read(before)
    if seen is None:
        return None
    if config.method != "mae" if isinstance(config, PretrainConfig) else not config.freeze_encoder:
        seen = np.union1d(seen, _hashes(sources))
    return base64.b64encode(seen[:KEPT].astype("<u8").tobytes()).decode()


def share_seen(facts: Mapping[str, Any], sources: Sources) -> float | None:
    """Estimate the share of records that the encoder of a checkpoint has seen with their names.

    Args:
        facts: Of the checkpoint.
        sources: Of the records.

    Returns:
        Between 0 and 1. None where the checkpoint keeps no sample, or where fewer than 30 of the
        records are such as its sample would hold, and it holds none of them.

    Raises:
        ModelError: The sample is damaged.
    """
    seen, own = _read(facts), _hashes(sources)
    if seen is None:
        return None
    if len(seen) == KEPT:
        own = own[own <= seen[-1]]
        if len(own) < ENOUGH and not np.isin(own, seen).any():
            return None
    return float(np.isin(own, seen).mean()) if len(own) else 0.0


def _read(facts: Mapping[str, Any]) -> NDArray[np.uint64] | None:
    kept = facts.get("seen")
    if kept is None:
        return None
    try:
        return np.frombuffer(base64.b64decode(kept), "<u8").astype(np.uint64)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"a model's sample of the records it saw is damaged ({error}); copy the checkpoint "
            "again"
        ) from error


def _hashes(sources: Sources) -> NDArray[np.uint64]:
    """Of names and places to a metre, distinct and rising."""
    if sources.dataset is None:
        return np.empty(0, np.uint64)
    told = sources.dataset.facts[["name", "longitude", "latitude"]].iloc[sources.rows].round(5)
    return np.unique(pd.util.hash_pandas_object(told, index=False).to_numpy(np.uint64))
