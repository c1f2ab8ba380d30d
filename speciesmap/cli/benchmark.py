"""`speciesmap benchmark`: how fast this machine encodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from speciesmap.cli.options import (
    PATH,
    imagery_option,
    json_option,
    logging_options,
    split_bands,
)


@click.command("benchmark")
@click.argument("model", type=PATH)
@imagery_option
@click.option(
    "--bands",
    metavar="B,B,...",
    callback=split_bands,
    help="Bands in the model's order: names or numbers of the file, or name=number.",
)
@click.option("--stride-px", type=click.IntRange(min=1), metavar="N", help="As for embed.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="As for embed.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1; chosen by default.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="As for embed.",
)
@click.option("--compile", "compiled", is_flag=True, help="As for embed.")
@click.option("--any-resolution", is_flag=True, help="As for embed.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    metavar="S",
    help="About how long the encoder, and then the engine, are measured.",
)
@json_option
@logging_options
def command(model: Path, as_json: bool, **options: Any) -> None:
    """Measure how fast this machine encodes.

    MODEL is a folder that `speciesmap train` wrote. Prints windows per second of the engine and of
    the encoder alone, what the processor achieves against a matrix product, memory, and where the
    time goes. Without --imagery noise is encoded.

    \b
    Example:
      speciesmap benchmark runs/finetuned --imagery naip/ --seconds 60
    """
    from speciesmap.mapping.benchmark import benchmark

    found = benchmark(model, **options)
    if as_json:
        click.echo(json.dumps(found))
        return
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in found["seconds"].items())
    gpu = found["peak_gpu_memory_mb"]
    for name, value in (
        ("processor", found["device"]),
        ("encoder", f"{found['backbone']}, {found['encoder']}, {found['precision']}"),
        ("windows", f"{found['windows']:,} of {found['window_px']} px, each {found['stride_px']}"),
        ("engine", f"{found['windows_per_s']:.1f} windows/s"),
        ("encoder alone", f"{found['encoder_windows_per_s']:.1f} windows/s"),
        ("ratio", f"{found['ratio']:.3f}"),
        (
            "achieved",
            f"{found['tflops']:.3g} TFLOP/s, {found['share_of_product']:.0%} of a matrix product's "
            f"{found['product_tflops']:.3g}",
        ),
        ("time", f"{found['engine_s']:.1f} s of the engine; side by side {stages}"),
        ("peak memory", f"{found['peak_memory_mb']:.0f} MB" + (f", GPU {gpu:.0f}" if gpu else "")),
    ):
        click.echo(f"{name:14} {value}")
