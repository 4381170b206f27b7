"""The table of the speed benchmarks, from stored results: for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from benchmarks.cases import Row

HEADINGS: Final = ("row", "ours", "TRL default", "the other's best", "ratio", "bar", "", "ours at the floor")


def met(row: Row, result: Mapping[str, Any]) -> bool | None:
    """Whether a row's bar is met; None where this machine cannot tell."""
    ratio = result["ratio"]
    if ratio is None:
        return None
    return bool(abs(ratio - 1) <= row.bar if row.kind == "slope" else ratio >= row.bar)


def cells(row: Row, result: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A row as text. Ratios are ours over the other's, so that more is better."""
    bar = {"slope": f"within {row.bar:.0%}", "share": f"{row.bar:.0%}"}.get(row.kind, f"{row.bar:g}x")
    if result is None:
        return (row.title, "", "", "", "", bar, "not measured", "")
    verdict = {True: "met", False: "missed", None: result.get("note") or "not measured"}[met(row, result)]
    ours, best = (_amount(result.get(name), result["unit"]) for name in ("ours", "best"))
    default = _amount(result.get("default"), result["unit"])
    if result.get("default_at_least"):
        default = f"over {_amount(result['default_at_least'], 's')}"
    ratio = result["ratio"]
    shown = "" if ratio is None else f"{ratio:.0%}" if row.kind == "share" else f"{ratio:.2f}x"
    floor = f"{_amount(result.get('floor'), result['unit'])}, {limit(result):.1f}x" if result.get("floor") else ""
    return (row.title, ours, default, best, shown, bar, verdict, floor)


def limit(result: Mapping[str, Any]) -> float:
    """The ratio that ours would have if it did nothing but its products, at the rate of large ones."""
    floor, best = result["floor"], result["best"]
    return float(floor / best if result["unit"] == "tok/s" else best / floor)


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def terminal(rows: Sequence[Row], results: Mapping[str, Mapping[str, Any]]) -> Table:
    """For a terminal."""
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*cells(row, results.get(row.name)))
    return table


def markdown(rows: Sequence[Row], results: Mapping[str, Mapping[str, Any]]) -> str:
    """For README and docs, with a line that says what the numbers come from."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(cells(row, results.get(row.name)) for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    origins = sorted({origin(result) for result in results.values()})
    return text + "".join(f"\n{one}" for one in origins) + ("\n" if origins else "")


def origin(result: Mapping[str, Any]) -> str:
    """Machine, commit and versions of a result, in one line."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    return (
        f"{machine['processor']} ({machine['features']}), {machine['threads']} threads, commit "
        f"{(result['commit'] or 'unknown')[:10]}, seed {result['seed']}, {result['pairs']} pairs; {versions}."
    )
