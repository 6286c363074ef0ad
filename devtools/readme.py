"""The README's tables of figures, written from the committed JSON so that they cannot drift from it."""
from pathlib import Path

from . import figures

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NONE_YET = "*(no figures committed yet)*"


def shown(leaf: dict) -> str:
    """A figure with its 95 % interval where the leaf carries one (`low`, `high`)."""
    def number(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    interval = f" ({number(leaf['low'])} to {number(leaf['high'])})" if {"low", "high"} <= leaf.keys() else ""
    return number(leaf["value"]) + interval


def table(found: dict) -> str:
    """All figures as a Markdown table; rates are fractions 0..1."""
    rows = [f"| `{name}` | {shown(leaf)} | {leaf['n']} |" for name, leaf in figures.leaves(found)]
    return "\n".join(["| figure | value (95 % interval) | n |", "| --- | --- | --- |", *rows]) if rows else NONE_YET


def tables() -> dict[str, str]:
    """Name of the marked place -> its content."""
    results = {path.stem: figures.read(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))}
    return {"scores": table(figures.read(ROOT / "mini" / "scores.json")), "benchmarks": table(results)}


def filled(text: str) -> str:
    """The README's text with every marked place (<!-- NAME:begin --> ... <!-- NAME:end -->) filled. Raises ValueError if a mark is gone."""
    for name, content in tables().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs the marks {begin} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def update() -> None:
    """Rewrite the README's tables."""
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
