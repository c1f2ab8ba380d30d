"""Taxa: the entities that maps are made of, and their names from kingdom to species."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from speciesmap.errors import QueryError


@dataclass(frozen=True)
class Taxon:
    """One entity with its scientific name and lineage.

    Attributes:
        name: Scientific name, for a species the binomial (`"Quercus agrifolia"`).
        lineage: Names of the higher ranks, broadest first, the taxon's own name left out
            (`("Plantae", "Fagaceae", "Quercus")`). May be empty.
    """

    name: str
    lineage: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fold white space, so that a name has one spelling.

        Raises:
            QueryError: The name is empty.
        """
        object.__setattr__(self, "name", " ".join(self.name.split()))
        object.__setattr__(self, "lineage", tuple(" ".join(n.split()) for n in self.lineage))
        if not self.name:
            raise QueryError("a taxon has an empty name; give its scientific name")

    @property
    def genus(self) -> str:
        """First word of the name."""
        return self.name.split(" ", 1)[0]

    @property
    def slug(self) -> str:
        """Name as a safe file stem, for example `quercus_agrifolia`."""
        return slug(self.name)

    def prompt(self, ranks: int | None = None) -> str:
        """Lineage as one line of text, broadest first.

        A name after its whole lineage is what BioCLIP was trained on (Stevens et al. 2024,
        "taxonomic names"); TaxaBind queries with the same form.

        Args:
            ranks: How many names to keep, counted from the broadest; all by default.

        Returns:
            The names; a genus that the binomial repeats is written once.

        >>> Taxon("Quercus agrifolia", ("Plantae", "Fagaceae", "Quercus")).prompt()
        'Plantae Fagaceae Quercus agrifolia'
        """
        names = list(self.lineage)
        own = self.name
        if names and own.startswith(names[-1] + " "):
            own = own[len(names[-1]) + 1 :]
        names.append(own)
        return " ".join(names if ranks is None else names[: max(1, ranks)])


def slug(text: str) -> str:
    """Turn any text into a lower-case ASCII file stem.

    Args:
        text: Any string, also one that comes from data.

    Returns:
        Letters, digits and underscores only; `"unnamed"` where nothing is left; at most 80
        characters.
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", ascii_text.lower()).strip("_")[:80] or "unnamed"


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """List the known names closest to a misspelt one, best first."""
    by_lower = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[m] for m in matches]


def find(name: str, taxa: Sequence[Taxon]) -> int:
    """Return the position of a named taxon.

    Args:
        name: Scientific name in any letter case, with spaces or underscores.
        taxa: Where to look.

    Raises:
        QueryError: No taxon has this name; the message gives the nearest known ones.
    """
    wanted = " ".join(name.replace("_", " ").split()).lower()
    for position, taxon in enumerate(taxa):
        if taxon.name.lower() == wanted:
            return position
    known = [taxon.name for taxon in taxa]
    close = nearest(wanted, known)
    if close:
        hint = "did you mean " + " or ".join(repr(c) for c in close) + "?"
    elif known:
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        hint = "it knows " + ", ".join(known[:5]) + more
    else:
        hint = "it knows no taxa; train it with `speciesmap train` or ask with --text or --photo"
    raise QueryError(f"the model does not know the species {name!r}; {hint}")
