"""The columns of Nature Multi-View: their names, types, and pixels in nested lists."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speciesmap.errors import DatasetError

AERIAL = "rs_image"
GROUND = "gl_image"
SIDECAR = "dataset.json"
FRACTIONS = ("0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "20.0", "100.0")
"""Shares of labelled rows, in percent, as Nature Multi-View names them."""

FACTS: dict[str, str] = {
    "observation_uuid": "string",
    "latitude": "float32",
    "longitude": "float32",
    "positional_accuracy": "int64",
    "taxon_id": "int64",
    "quality_grade": "string",
    "gl_image_date": "string",
    "ancestry": "string",
    "rank": "string",
    "name": "string",
    "gl_inat_id": "string",
    "gl_photo_id": "int64",
    "license": "string",
    "observer_id": "string",
    "rs_classification": "bool",
    "ecoregion": "string",
    "supervised": "bool",
    **{f"finetune_{percent}percent": "bool" for percent in FRACTIONS},
    "rs_image_date": "string",
}
"""The columns beside the two images, with the types of Nature Multi-View."""


def schema(dtype: np.dtype[Any]) -> pa.Schema:
    """Give the Parquet schema of a paired data set, with Hugging Face's feature types in it.

    Args:
        dtype: Type of the aerial pixels.
    """
    pixel = pa.from_numpy_dtype(dtype)
    aerial = pa.list_(pa.list_(pa.list_(pixel)))
    ground = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    value = {name: {"dtype": kind, "_type": "Value"} for name, kind in FACTS.items()}
    features = {
        **value,
        GROUND: {"_type": "Image"},
        AERIAL: [[[{"dtype": str(np.dtype(dtype)), "_type": "Value"}]]],
    }
    columns = [(name, pa.type_for_alias(kind)) for name, kind in FACTS.items()]
    return pa.schema(
        [*columns, (GROUND, ground), (AERIAL, aerial)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def encode_windows(windows: NDArray[Any]) -> pa.Array:
    """Turn pixels of shape (N, B, P, P) into N lists of lists of lists, without a Python loop."""
    column = pa.array(windows.reshape(-1))
    for length in windows.shape[:0:-1]:
        offsets = np.arange(0, len(column) + 1, length, dtype=np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), column)
    return column


def decode_windows(column: pa.Array, where: str = AERIAL, first_row: int = 0) -> NDArray[Any]:
    """Turn nested lists of pixels into one array through their Arrow buffers.

    Args:
        column: Lists, large lists or lists of fixed size, three deep, of numbers; sliced or not.
        where: What to call the column in an error.
        first_row: Number of the column's first row, for errors.

    Returns:
        Pixels as stored, shape (N, B, P, P).

    Raises:
        DatasetError: A window is missing, ragged, not three deep or not of numbers.
    """
    shape = [len(column)]
    while True:
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        kind = column.type
        if column.null_count:
            null = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            row = first_row + null // max(1, int(np.prod(shape[1:])))
            raise DatasetError(f"row {row} of {where} has no pixels or lacks some; leave it out")
        if pa.types.is_fixed_size_list(kind):
            shape.append(kind.list_size)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = np.diff(column.offsets.to_numpy())
            length = int(lengths[0]) if len(lengths) else 0
            odd = np.flatnonzero(lengths != length)
            if odd.size:
                row = first_row + int(odd[0]) // max(1, int(np.prod(shape[1:])))
                raise DatasetError(
                    f"row {row} of {where} has {lengths[odd[0]]} values where other rows have "
                    f"{length}; all windows of a data set must have one shape"
                )
            shape.append(length)
        else:
            break
        column = column.flatten()
    if len(shape) != 4 or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DatasetError(
            f"{where} holds {kind} in lists {len(shape) - 1} deep; "
            "expected numbers in lists 3 deep: band, row, column"
        )
    pixels: NDArray[Any] = column.to_numpy(zero_copy_only=False).reshape(shape)
    return pixels
