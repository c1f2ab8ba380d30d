"""The ODMAP protocol has its 84 elements, and says what it does not know."""

from __future__ import annotations

import pytest

from speciesmap.present.odmap import TO_BE_FILLED, protocol


def test_all_84_elements_are_there_once() -> None:
    table = protocol({})
    assert len(table) == 84
    assert not table.duplicated(["section", "subsection", "element"]).any()
    assert (table["value"] == TO_BE_FILLED).all()
    sizes = table.groupby("section", sort=False).size().to_dict()
    assert sizes == {"Overview": 25, "Data": 33, "Model": 14, "Assessment": 5, "Prediction": 7}


def test_what_is_known_is_filled_and_what_is_strange_refused() -> None:
    key = ("Overview", "Location", "Location")
    table = protocol({key: "California", ("Overview", "Hypotheses", "Hypotheses"): ""})
    filled = table[table["value"] != TO_BE_FILLED]
    assert filled.iloc[0].tolist() == [*key, "California"]
    assert len(filled) == 1
    with pytest.raises(ValueError, match="ODMAP has no element"):
        protocol({("Overview", "Location", "Nowhere"): "x"})
