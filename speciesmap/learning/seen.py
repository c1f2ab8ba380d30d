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
from speciesmap.learning.sources import Sources
from speciesmap.models import read_facts

KEPT = 4096  # hashes; of a million records that training saw, 1,000 share four


def sample_seen(config: PretrainConfig | FinetuneConfig, sources: Sources) -> str:
    """Sample what an encoder has seen after a stage, before which its initial model saw some too.

    Masked images have no names, and heads on a frozen encoder leave none in it.
    """
    if isinstance(config, PretrainConfig):
        init = config.crossview.aerial_init if config.method == "cve_mae" else None
        sees = config.method != "mae"
    else:
        init, sees = config.init, not config.freeze_encoder
    seen = _read(read_facts(init)) if init is not None else np.empty(0, np.uint64)
    if sees:
        seen = np.union1d(seen, _hashes(sources))
    return base64.b64encode(seen[:KEPT].astype("<u8").tobytes()).decode()


def share_seen(facts: Mapping[str, Any], sources: Sources) -> float:
    """Estimate the share of records that the encoder of a checkpoint has seen with their names.

    Args:
        facts: Of the checkpoint.
        sources: Of the records.
    """
    seen, own = _read(facts), _hashes(sources)
    if len(seen) == KEPT:
        own = own[own <= seen[-1]]
    return float(np.isin(own, seen).mean()) if len(own) else 0.0


def _read(facts: Mapping[str, Any]) -> NDArray[np.uint64]:
    return np.frombuffer(base64.b64decode(facts.get("seen", "")), "<u8").astype(np.uint64)


def _hashes(sources: Sources) -> NDArray[np.uint64]:
    """Of names and places to a metre, distinct and rising."""
    if sources.dataset is None:
        return np.empty(0, np.uint64)
    told = sources.dataset.facts[["name", "longitude", "latitude"]].iloc[sources.rows].round(5)
    return np.unique(pd.util.hash_pandas_object(told, index=False).to_numpy(np.uint64))
