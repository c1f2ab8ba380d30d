"""Taxa: the entities that maps are made of, and their names from kingdom to species."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from speciesmap.errors import QueryError

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
"""Ranks that a lineage is made of, broadest first."""


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


def well_cased(text: str) -> str:
    """Write two words as a binomial is written, where their case shows that they are not.

    Museums' `QUERCUS AGRIFOLIA` and hand-typed `quercus Agrifolia` would else be other taxa than
    `Quercus agrifolia`.

    >>> well_cased("QUERCUS AGRIFOLIA"), well_cased("quercus agrifolia"), well_cased("Quercus Née")
    ('Quercus agrifolia', 'Quercus agrifolia', 'Quercus Née')
    """
    binomial = re.fullmatch(r"[^\W\d_]{2,} [^\W\d_]{2,}(-[^\W\d_]+)*", text)
    return text.capitalize() if binomial and (text.isupper() or text[0].islower()) else text


CONNECTING_TERMS = ("var.", "var", "subsp.", "ssp.", "forma", "subvar.")


def scientific_name(text: str, *, trinomial: bool = False) -> str:
    """Cut the author, and what stands below the species, off a scientific name.

    What does not look like a scientific name is left as it is.

    Args:
        text: For example `"Quercus agrifolia var. oxyadenia (Torr.) J.T.Howell"`.
        trinomial: Whether a third plain word is an infraspecific epithet, as zoologists and
            iNaturalist write it.

    Returns:
        For example `"Quercus agrifolia"`; `"Quercus"` for `"Quercus sp."`, `"Quercus L."` and
        `"Quercus cf. agrifolia"`.
    """
    if re.fullmatch(r"[A-Z][a-z]+_[a-z-]+", text):
        text = text.replace("_", " ")
    words = well_cased(" ".join(text.split())).split()
    if len(words) < 2 or not words[0][0].isupper():
        return " ".join(words)
    epithet = re.fullmatch(r"[^\W\d_A-Z][\w-]+", words[1]) is not None and words[1].islower()
    author = re.match(r"[A-Z(&\[]", words[1]) is not None and len(words[1]) > 1
    if words[1].lower() in ("sp.", "spp.", "sp", "spp", "cf.", "aff.", "indet.") or (
        author and not epithet
    ):
        return words[0]
    if not epithet or len(words) == 2:
        return " ".join(words)
    marker = words[2].lower() in (*CONNECTING_TERMS, "f.")
    authored = re.match(r"[A-Z(&\[]", words[2]) is not None
    lower_author = words[2] in ("de", "von", "van", "ex", "f.", "d'", "et")
    if marker or authored or lower_author or (trinomial and words[2].islower()):
        return " ".join(words[:2])
    return " ".join(words)


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


def every_name(taxa: Iterable[Taxon]) -> tuple[str, ...]:
    """List the names of taxa and of all that is in their lineages, each once."""
    return tuple(dict.fromkeys(name for taxon in taxa for name in (taxon.name, *taxon.lineage)))


def words(text: str) -> set[str]:
    """Words of a text, as a tokenizer that knows no case parts them.

    >>> sorted(words("Quercus x_alvordiana, 1905"))
    ['alvordiana', 'quercus', 'x']
    """
    return set(re.findall(r"[^\W\d_]+", text.casefold()))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """List the known names closest to a misspelt one, best first."""
    by_lower = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count)
    return [by_lower[m] for m in matches]


def listed(names: Sequence[str]) -> str:
    """Join names, of more than five the first five and a count.

    >>> listed("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def suggestion(name: str, known: Sequence[str]) -> str:
    """Say which known names a strange one may stand for, else what is known at all."""
    close = nearest(name, known)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"it knows {listed(known)}"


def find(name: str, taxa: Sequence[Taxon]) -> int:
    """Return the position of a named taxon.

    Args:
        name: Scientific name in any letter case, with spaces or underscores, with or without its
            author.
        taxa: Where to look.

    Raises:
        QueryError: No taxon has this name; the message gives the nearest known ones.
    """
    known = [taxon.name for taxon in taxa]
    folded = [other.lower() for other in known]
    spaced = " ".join(name.replace("_", " ").split())
    another = {"cf.", "aff.", *CONNECTING_TERMS} & set(spaced.lower().split())
    spellings = [spaced] if another else [spaced, scientific_name(spaced)]
    for wanted in map(str.lower, spellings):
        if wanted in folded:
            return folded.index(wanted)
    hint = "it knows no taxa; train it with `speciesmap train` or ask with --text or --photo"
    if known:
        hint = suggestion(wanted, known)
    raise QueryError(f"the model does not know the species {name!r}; {hint}")
