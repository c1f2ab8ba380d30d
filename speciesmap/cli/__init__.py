"""The command line: each command parses, calls one function and prints a path."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from speciesmap.errors import SpeciesmapError, within_memory

COMMANDS = {
    "demo": "Map two scenes from raw input to HTML, one real and one simulated.",
    "simulate": "Write a virtual landscape with known truth.",
    "observations": "Clean species records into one table.",
    "chips": "Cut a paired photo and aerial data set.",
    "train": "Pre-train or fine-tune from a YAML configuration.",
    "evaluate": "Judge a model: its maps beside simpler methods, or what its views find.",
    "embed": "Encode an area once into an embedding store.",
    "predict": "Map species, photos or text over an area.",
    "map": "Put maps into one interactive HTML page.",
    "view": "Show a map in full resolution in the browser.",
    "benchmark": "Measure how fast this machine encodes.",
    "umap": "Colour an area by what its windows look like to the model.",
    "info": "Tell what a model, store, data set or map is.",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the commands in the order of a project's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command by name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"speciesmap.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; of words too many say what mostly makes them."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if "unexpected extra argument" not in error.message:
                raise
            raise click.UsageError(
                f"{error.message}. Put names of several words, and patterns of files, in quotes: "
                "\"Quercus agrifolia\", 'naip/*.tif'",
                error.ctx,
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="speciesmap")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Map where species live, from imagery, ground photos and names."""
    log = logging.getLogger("speciesmap")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        ctx.call_on_close(lambda: log.removeHandler(handler))  # its stderr may end with the call


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error to mend, 2 a wrong call.

    Args:
        arguments: Words after the program's name; those of the process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    log = logging.getLogger("speciesmap")
    level = log.level
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C
    try:
        with within_memory():
            group.main(args=split_bbox(words), prog_name="speciesmap")
    except SpeciesmapError as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    finally:  # the process may go on with other work
        log.setLevel(level)
        signal.signal(signal.SIGTERM, earlier)


def split_bbox(words: Sequence[str]) -> list[str]:
    """Accept `--bbox W,S,E,N` beside `--bbox W S E N`."""
    split: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--bbox" and equals:
            split += ["--bbox", *value.replace(",", " ").split()]
        elif split and split[-1] == "--bbox" and "," in word:
            split += word.replace(",", " ").split()
        elif len(split) > 1 and "--bbox" in split[-4:] and word.endswith(","):
            split.append(word.rstrip(","))
        else:
            split.append(word)
    return split
