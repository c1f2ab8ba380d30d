"""Names: one spelling each, prompts that repeat nothing, and help with misspelt ones."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciesmap.errors import QueryError
from speciesmap.taxa import Taxon, find, nearest, slug

OAK = Taxon("Quercus agrifolia", ("Plantae", "Fagaceae", "Quercus"))
PINE = Taxon("Pinus sabiniana", ("Plantae", "Pinaceae", "Pinus"))


def test_a_name_has_one_spelling() -> None:
    assert Taxon(" Quercus \t agrifolia\n", ("Plantae", "Fagaceae ", "Quercus")) == OAK
    assert (OAK.genus, OAK.slug) == ("Quercus", "quercus_agrifolia")
    with pytest.raises(QueryError, match="empty name"):
        Taxon(" \t")


def test_a_prompt_is_the_lineage_without_repeating_the_genus() -> None:
    assert OAK.prompt() == "Plantae Fagaceae Quercus agrifolia"
    assert OAK.prompt(2) == "Plantae Fagaceae"
    assert OAK.prompt(0) == "Plantae"
    assert Taxon("Quercus agrifolia").prompt() == "Quercus agrifolia"
    assert Taxon("Quercus agrifolia", ("Fagaceae",)).prompt() == "Fagaceae Quercus agrifolia"
    assert Taxon("Quercusella x", ("Quercus",)).prompt() == "Quercus Quercusella x"


def test_any_spelling_of_a_known_name_is_found() -> None:
    assert find("QUERCUS  agrifolia", (PINE, OAK)) == 1
    assert find("pinus_sabiniana", (PINE, OAK)) == 0
    assert find("Quercus agrifolia Née", (PINE, OAK)) == 1
    assert find("Pinus sabiniana (Douglas ex D.Don) Loudon, 1832", (PINE, OAK)) == 0
    authored = Taxon("Quercus agrifolia Née")  # as somebody's own table may name it
    assert find("Quercus agrifolia née", (PINE, OAK, authored)) == 2


@pytest.mark.parametrize("name", ["Quercus agrifolia var. oxyadenia", "Quercus cf. agrifolia"])
def test_another_taxon_than_the_known_one_is_not_taken_for_it(name: str) -> None:
    with pytest.raises(QueryError, match="does not know"):
        find(name, (PINE, OAK, Taxon("Quercus")))


def test_an_unknown_name_gets_help() -> None:
    with pytest.raises(QueryError, match=r"'Quercus agrifola'; did you mean 'Quercus agrifolia'\?"):
        find("Quercus agrifola", (PINE, OAK))
    with pytest.raises(QueryError, match=r"it knows Pinus sabiniana, Quercus agrifolia$"):
        find("xyzzy", (PINE, OAK))
    many = [Taxon(f"Genus{letter} species") for letter in string.ascii_lowercase]
    with pytest.raises(QueryError, match="and 21 more"):
        find("1234567890", many)
    with pytest.raises(QueryError, match=r"knows no taxa.*--text"):
        find("Quercus agrifolia", ())


def test_nearest_keeps_the_known_spelling_best_first() -> None:
    assert nearest("quercus agrifola", ["Pinus", "Quercus lobata", "Quercus agrifolia"])[0] == (
        "Quercus agrifolia"
    )
    assert nearest("zzz", ["Pinus"]) == []


@given(st.text())
def test_any_text_makes_a_safe_file_stem(text: str) -> None:
    stem = slug(text)
    assert 0 < len(stem) <= 80
    assert set(stem) <= set(string.ascii_lowercase + string.digits + "_")
    assert slug(stem) == stem.strip("_")


def test_accents_fold_and_paths_cannot_escape() -> None:
    assert slug("Épilobe à feuilles") == "epilobe_a_feuilles"
    assert slug("../../etc/passwd") == "etc_passwd"
    assert slug("橡树") == "unnamed"
