"""`speciesmap umap`: a store's embeddings as colours."""

from __future__ import annotations

from pathlib import Path

import click

from speciesmap.cli.options import (
    PATH,
    PATH_OR_ADDRESS,
    SEED,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)


@click.command("umap")
@click.argument("store", type=PATH_OR_ADDRESS, metavar="STORE.zarr|DATASET")
@out_option(
    "FILE.tif", "GeoTIFF to write, with a page FILE.html beside it; of photos, .html or .png."
)
@click.option(
    "--photos", "model", type=PATH, metavar="MODEL", help="Draw the photos of DATASET instead."
)
@click.option(
    "--rank",
    type=int,
    default=-2,
    show_default=True,
    metavar="N",
    help="Name of the lineage that colours photos: 0 the broadest, -1 the last, often the genus.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=8),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Cells that UMAP is fitted on; all are placed.",
)
@click.option(
    "--neighbours",
    type=click.IntRange(min=2),
    default=30,
    show_default=True,
    metavar="N",
    help="Size of the neighbourhoods that UMAP keeps.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    metavar="N",
    help="Of the sample and the fit; the same seed gives the same colours.",
)
@overwrite_option
@json_option
@logging_options
def command(
    store: Path | str,
    out: Path,
    model: Path | None,
    rank: int,
    sample: int,
    neighbours: int,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Colour an area by what its windows look like to the model.

    Every cell of an embedding store gets the colour of its place in a three-dimensional UMAP: cells
    of like colours are alike from above. With --photos, the ground photos of a paired data set are
    drawn as points coloured by taxonomy. Needs `pip install 'speciesmap[umap]'`.

    \b
    Example:
      speciesmap umap chips --photos runs/pretrained --out photos.html
      speciesmap umap maps.store.zarr --out colours.tif
    """
    from speciesmap.mapping.umap import photo_points, umap_colours, umap_points
    from speciesmap.outputs import refuse_existing, replacing
    from speciesmap.present.picture import picture_map

    if model is not None:
        from speciesmap.datasets.birds import open_dataset
        from speciesmap.models import load_model

        refuse_existing(out, overwrite, store, model)
        points = photo_points(load_model(model), open_dataset(store), rank, sample, seed)
        umap_points(
            *points,
            out=out,
            title=f"Photos of {Path(store).name}",
            neighbours=neighbours,
            seed=seed,
            overwrite=overwrite,
        )
        print_result(out, as_json)
        return
    page = out.with_suffix(".html")
    refuse_existing(out, overwrite, store)
    refuse_existing(page, overwrite)
    with replacing(page, overwrite=overwrite) as html, replacing(out, overwrite=overwrite) as tif:
        umap_colours(store, tif, sample=sample, neighbours=neighbours, seed=seed)
        picture_map(
            tif,
            html,
            title=f"Colours of {Path(store).name}",
            caption="Cells of like colours look alike to the model from above.",
        )
    print_result(out, as_json, html=page)
