"""One page that says how good a model is, beside what else would have made the map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from speciesmap.present.odmap import TO_BE_FILLED

MEASURES = {
    "auc": ("AUC", "against random background"),
    "auc_target_group": ("AUC, target group", "against places of the target group"),
    "average_precision": ("AP", "average precision against random background"),
    "boyce": ("Boyce", "continuous Boyce index"),
    "tss": ("TSS", "true skill statistic at the threshold"),
    "omission": ("omission", "share of held-out presences below the threshold"),
    "brier_skill": ("Brier skill", "against the base rate"),
    "calibration_error": ("ECE", "expected calibration error"),
}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --ink: #16211b; --soft: #55645b; --line: #d9e0db; --paper: #fff; --back: #f4f6f4;
  --own: #1f6f4a; --other: #6b7b84; --bad: #9a3412; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--back); }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 0 0 .35rem; }
p { margin: .35rem 0 .9rem; max-width: 46rem; color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.25rem 1.4rem; margin-top: 1.25rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem;
  margin-top: 1.25rem; }
.figure { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.2rem; }
.figure b { display: block; font-size: 1.8rem; font-weight: 650; color: var(--own);
  font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
:focus-visible { outline: 3px solid var(--own); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem; }
td.text { text-align: left; white-space: normal; }
tr.own td { font-weight: 650; background: #eef6f1; }
.warn { color: var(--bad); }
.empty { color: #68766d; font-style: italic; }
svg { max-width: 100%; display: block; overflow: visible; }
.rungs { margin: 0 0 1rem; font-size: .88rem; }
.rung { display: grid; grid-template-columns: minmax(0, 26rem) minmax(0, 1fr) 3.2rem;
  column-gap: 1.1rem; align-items: center; }
.rung span { text-align: right; }
.rung svg { width: 100%; grid-column: 2; }
.rung b { font-weight: 400; font-variant-numeric: tabular-nums; }
.rung.own span, .rung.own b { font-weight: 650; }
@media (max-width: 44rem) {
  .rung { grid-template-columns: minmax(0, 1fr) 3.2rem; }
  .rung span { grid-column: 1 / -1; text-align: left; margin-top: .3rem; }
  .rung svg { grid-column: 1; }
  section { padding: 1.1rem 1rem; }
}
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); }
details summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: .7rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-end; }
figure { margin: 0; max-width: 280px; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem; }
</style></head><body><main>
<h1>$title</h1>
<p>$lead</p>
<div class="figures">$figures</div>
$sections
</main></body></html>
""")


def write_report(result: Mapping[str, Any], protocol: pd.DataFrame, path: Path) -> Path:
    """Write the evaluation as one HTML file that needs nothing else, and no script.

    Args:
        result: What `report.json` holds.
        protocol: The filled ODMAP protocol.
        path: Of the page.
    """
    head, rungs = result["head"], result["rungs"]
    names = list(result["taxa"])
    title = (
        f"How good is the map of {names[0]}?"
        if len(names) == 1
        else f"How good are the maps of {len(names)} taxa?"
    )
    lead = (
        f"Model \u201c{result['model']['name']}\u201d, {result['background']:,} background places, "
        f"{len(result['folds'])} folds: {result['folding']}. Every method below was "
        "trained and judged on the same rows; no training window overlaps a held-out one. "
        f"Embeddings are those of {result['encoder']['note']}."
    )
    if result["covariates"]:
        lead += f" Covariates: {', '.join(Path(str(c)).name for c in result['covariates'])}."
    own_rung = head[0].upper() + head[1:]
    own = rungs[head]["mean"]
    figures = [
        (own["auc"], f"AUC of {head}, on held-out blocks"),
        (own["auc_target_group"], "AUC against the target group"),
        (own["boyce"], "continuous Boyce index"),
        (own["calibration_error"], "expected calibration error, record against background"),
    ]
    sections = [
        _section(
            "The ladder",
            "Mean AUC over taxa and folds with its standard error; the table below pools the "
            "folds. A rung that is not above the ones before it adds nothing that simpler means "
            "would not give.",
            _ladder(rungs, head) + _measures(rungs, head),
        ),
        _section(
            "Differences",
            f"{own_rung} minus each method, paired by taxon and fold. Folds share training rows, "
            "so the standard error is a lower bound.",
            _differences(result["differences"]),
        ),
        _section("Does it look, or does it know the place?", "", f"<p>{_shuffle_text(result)}</p>"),
        _section(
            "Calibration",
            "Scores were turned into odds of a record against background on the other folds. On "
            "the diagonal, what is said is what is found.",
            '<div class="plots">'
            + "".join(
                _reliability(name, rungs[name]["reliability"]) for name in _plotted(rungs, head)
            )
            + "</div>",
        ),
        _section(
            "By taxon",
            f"{own_rung}, on held-out blocks. A map is called uninformative where the mean AUC "
            "of its folds is not above that which 95 of 100 null maps stay below, whose records "
            "were drawn from the places of the whole group (Raes & ter Steege 2007); or, where "
            "there is no group to draw from, where its folds cannot be told from chance.",
            _taxa(rungs[head]["taxa"], result["taxa"]),
        ),
    ]
    if "surveys" in result:
        sections.append(_surveys(result["surveys"]))
    if result["notes"] or result["skipped"]:
        items = [*result["notes"], *(f"{k}: {v}" for k, v in result["skipped"].items())]
        listed = "".join(f"<li>{escape(str(item))}</li>" for item in items)
        sections.append(_section("What to keep in mind", "", f"<ul>{listed}</ul>"))
    sections.append(_odmap(protocol))
    page = PAGE.substitute(
        title=escape(title),
        lead=escape(lead),
        figures="".join(
            f'<div class="figure"><b>{_number(value)}</b><span>{escape(text)}</span></div>'
            for value, text in figures
            if value is not None
        ),
        sections="".join(sections),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _section(title: str, text: str, body: str) -> str:
    words = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{words}{body}</section>"


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or value != value:
        return "&ndash;"
    return (f"{value:+.3f}" if sign else f"{value:.3f}").replace("-", "&minus;")


def _fold_values(rung: Mapping[str, Any]) -> list[float]:
    return [v for taxon in rung["taxa"].values() for v in taxon["auc_folds"] if v is not None]


def _ladder(rungs: Mapping[str, Any], head: str) -> str:
    """Dots with error bars, lowest rung at the top; on a narrow screen names stand above them."""
    values = {name: pd.Series(_fold_values(rung), dtype=float) for name, rung in rungs.items()}
    means = [series.mean() for series in values.values() if len(series)]
    low = min(0.4, *(0.05 * int(mean / 0.05) for mean in means)) if means else 0.4
    ticks = [tick / 10 for tick in range(round(low * 10), 11)]

    def x(value: float) -> str:
        return f"{100 * (min(max(value, low), 1) - low) / (1 - low):.2f}%"

    grid = "".join(
        f'<line x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="30" '
        f'stroke="{"#9aa7a0" if tick == 0.5 else "#e4e9e6"}"/>'
        for tick in ticks
    )
    parts = [
        '<div class="rungs"><div class="rung"><svg class="axis" height="18" aria-hidden="true">',
        *(
            f'<text class="soft" x="{x(tick)}" y="12" text-anchor="middle">{tick:.1f}</text>'
            for tick in ticks
        ),
        "</svg></div>",
    ]
    for name, series in values.items():
        own = " own" if name == head else ""
        colour = "#1f6f4a" if own else "#6b7b84"
        mean = float(series.mean()) if len(series) else None
        dot = ""
        if mean is not None:
            error = float(series.sem()) if len(series) > 1 else 0.0
            dot = (
                f'<line x1="{x(mean - error)}" x2="{x(mean + error)}" y1="15" y2="15" '
                f'stroke="{colour}" stroke-width="3" stroke-opacity=".45"/>'
                f'<circle cx="{x(mean)}" cy="15" r="5.5" fill="{colour}"/>'
            )
        parts.append(
            f'<div class="rung{own}"><span>{escape(name)}</span>'
            f'<svg height="30" aria-hidden="true">{grid}{dot}</svg><b>{_number(mean)}</b></div>'
        )
    return "".join(parts) + "</div>"


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Cells are HTML already."""
    header = "".join(f"<th scope=col>{column}</th>" for column in columns)
    body = "".join(
        f"<tr{css}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for css, cells in rows
    )
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'


def _shown(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Headings of the measures that at least one row has."""
    rows = list(rows)
    return {
        key: f'<span title="{escape(text)}">{escape(name)}</span>'
        for key, (name, text) in MEASURES.items()
        if any(pd.notna(row.get(key)) for row in rows)
    }


def _measures(rungs: Mapping[str, Any], head: str) -> str:
    shown = _shown(rung["mean"] for rung in rungs.values())
    rows = [
        (
            ' class="own"' if name == head else "",
            [escape(name), *(_number(rung["mean"][key]) for key in shown)],
        )
        for name, rung in rungs.items()
    ]
    return _table(["method, mean over taxa", *shown.values()], rows)


def _differences(differences: Mapping[str, Any]) -> str:
    rows = [
        (
            "",
            [
                escape(name),
                _number(gap["difference"], sign=True),
                _number(gap["standard_error"]),
                f"{gap['better']} of {gap['pairs']}",
            ],
        )
        for name, gap in differences.items()
    ]
    return _table(["against", "difference of AUC", "standard error", "higher in"], rows)


def _shuffle_text(result: Mapping[str, Any]) -> str:
    found = result["shuffle"]
    return (
        "With its coordinates and its own imagery a head reaches an AUC of "
        f"{_number(found['auc'])}; with the imagery of other places, coordinates kept, "
        f"{_number(found['auc_shuffled'])}. What imagery adds is "
        f"{_number(found['difference'], True)}, standard error "
        f"{_number(found['standard_error'])}; what is left was learned "
        "from location alone."
    )


def _plotted(rungs: Mapping[str, Any], head: str) -> list[str]:
    others = [name for name in rungs if name.startswith("MaxEnt")]
    return [head, *others][:3]


def _reliability(name: str, table: Sequence[Mapping[str, float]]) -> str:
    """Observed against predicted frequency; a dot's area is the share of places in its bin.

    Both axes end at the first tenth above all dots, since records are rare among background.
    """
    side, pad = 230, 38
    total = sum(row["count"] for row in table) or 1
    most = max((max(row["predicted"], row["observed"]) for row in table), default=1.0)
    end = min(1.0, (int(most * 10) + 1) / 10)
    parts = [
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f'<svg width="{side + pad + 12}" viewBox="0 14 {side + pad + 12} {side + pad + 20}" '
        f'role="img" aria-label="Reliability of {escape(name)}">'
        f'<rect x="{pad}" y="24" width="{side}" height="{side}" fill="none" stroke="#d9e0db"/>'
        f'<line x1="{pad}" y1="{24 + side}" x2="{pad + side}" y2="24" stroke="#9aa7a0" '
        'stroke-dasharray="4 4"/>'
    ]
    for row in table:
        cx, cy = pad + side * row["predicted"] / end, 24 + side * (1 - row["observed"] / end)
        radius = 2.5 + 11 * (row["count"] / total) ** 0.5
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}" fill="#1f6f4a" '
            'fill-opacity=".65"/>'
        )
    bottom = 24 + side
    parts.append(
        f'<text class="soft" x="{pad}" y="{bottom + 18}">0</text>'
        f'<text class="soft" x="{pad + side}" y="{bottom + 18}" text-anchor="end">{end:g}</text>'
        f'<text class="soft" x="{pad + side / 2}" y="{bottom + 32}" text-anchor="middle">'
        "predicted</text>"
        f'<text class="soft" transform="translate(16 {24 + side / 2}) rotate(-90)" '
        'text-anchor="middle">observed</text></svg></figure>'
    )
    return "".join(parts)


def _taxa(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    rows = []
    nulls = any(measures["auc_null"] is not None for measures in found.values())
    shown = _shown(found.values())
    for name, measures in found.items():
        few = facts[name]["few"]
        warning = ' <span class="warn">too few presences</span>' if few else ""
        if measures["informative"] is False:
            warning += ' <span class="warn">uninformative</span>'
        cells = [
            f"{escape(name)}{warning}",
            str(facts[name]["presences"]),
            *([_number(measures["auc_mean"]), _number(measures["auc_null"])] if nulls else []),
            *(_number(measures[key]) for key in shown),
        ]
        rows.append(("", cells))
    compared = ["mean AUC of folds", "of null maps"] if nulls else []
    return _table(["taxon", "presences", *compared, *shown.values()], rows)


def _surveys(found: Mapping[str, Any]) -> str:
    shown = _shown(found["taxa"].values())
    shown.pop("auc_target_group", None)
    rows = [
        (
            "",
            [
                escape(taxon),
                escape(measures["quantity"]),
                f"{measures['presences']} of {measures['places']}",
                *(_number(measures[key]) for key in shown),
            ],
        )
        for taxon, measures in found["taxa"].items()
    ]
    columns = ["taxon", "quantity", "present", *shown.values()]
    body = _table(columns, rows)
    if found["reliability"]:
        body += _reliability("surveyed presence", found["reliability"])
    text = (
        f"The model's own maps at {found['places']} surveyed rows; {found['left_out']} rows whose "
        "window overlaps a presence's, or which lie off the imagery, were left out."
    )
    return _section("At surveyed sites", text, body)


def _odmap(protocol: pd.DataFrame) -> str:
    filled = int((protocol["value"] != TO_BE_FILLED).sum())
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="text{" empty" if value == TO_BE_FILLED else ""}">{escape(str(value))}</td>'
            for value in row
        )
        + "</tr>"
        for row in protocol.itertuples(index=False)
    )
    return (
        "<section><details><summary>ODMAP protocol: "
        f"{filled} of {len(protocol)} elements filled</summary>"
        "<div class=wide tabindex=0><table><thead><tr><th>section</th>"
        "<th class=text>subsection</th><th class=text>element</th><th class=text>value</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div></details></section>"
    )
