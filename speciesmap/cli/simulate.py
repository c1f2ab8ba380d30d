"""`speciesmap simulate`: a virtual landscape with known truth."""

from __future__ import annotations

from pathlib import Path

import click

from speciesmap.cli.options import (
    SEED,
    json_option,
    logging_options,
    out_option,
    overwrite_option,
    print_result,
)


@click.command("simulate")
@out_option("DIR", "Folder to create.")
@click.option("--size-px", default=2048, show_default=True, help="Side of the raster in pixels.")
@click.option("--species", default=8, show_default=True, help="Species, the control among them.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same files.")
@overwrite_option
@json_option
@logging_options
def command(
    out: Path, size_px: int, species: int, seed: int, overwrite: bool, as_json: bool
) -> None:
    """Write a virtual landscape with known truth.

    DIR gets aerial.tif (red, green, blue, near infrared at 0.6 m), observations.csv in the
    columns of an iNaturalist export, one ground photo per observation, the true probability of
    each species, and sites.csv, an independent presence-absence survey. The last species is a
    control that follows nothing visible.

    \b
    Example:
      speciesmap simulate --out scene --size-px 1024 --species 5 --seed 1
    """
    from speciesmap.simulate import simulate

    scene = simulate(out, size_px=size_px, species=species, seed=seed, overwrite=overwrite)
    print_result(
        scene.path,
        as_json,
        imagery=str(scene.aerial),
        observations=str(scene.observations),
        photos=str(scene.photos),
        truth={taxon: str(raster) for taxon, raster in scene.truth.items()},
        sites=str(scene.sites),
    )
