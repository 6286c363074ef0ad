"""The README's tables of figures, written from the committed JSON so that they cannot drift from it."""
from pathlib import Path

from . import figures

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FOLDED = {"details", "by_edit", "sweep", "rendered", "autoencoded"}  # groups of figures that readers open if they want them
NONE_YET = "*(no figures committed yet)*"


def shown(leaf: dict) -> str:
    """A figure with its 95 % interval where the leaf carries one (`low`, `high`)."""
    def number(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    interval = f" ({number(leaf['low'])} to {number(leaf['high'])})" if {"low", "high"} <= leaf.keys() else ""
    return number(leaf["value"]) + interval


def table(found: dict) -> str:
    """All figures as Markdown tables, the main ones first and the others folded; rates are fractions 0..1."""
    main, folded = [], []
    for name, leaf in figures.leaves(found):
        (folded if FOLDED & set(name.split(".")) else main).append(f"| `{name}` | {shown(leaf)} | {leaf['n']} |")
    head = ["| figure | value (95 % interval) | n |", "| --- | --- | --- |"]
    parts = ["\n".join([*head, *main])] if main else [] if folded else [NONE_YET]
    if folded:
        # the blank lines are Markdown's, inside of HTML
        parts.append("\n".join([f"<details><summary>{len(folded)} figures in detail</summary>", "", *head, *folded, "", "</details>"]))
    return "\n\n".join(parts)


def repairs(found: dict) -> str:
    """The four ways back from an inversion side by side, from the group `inversion_repairs`."""
    ways = {"ddim": "DDIM, no repair", "negative_prompt": "negative-prompt inversion", "null_text": "Null-Text Optimize", "direct": "P2P Controller with trajectory (direct)"}
    columns = {"structure_kept": "structure kept", "background_psnr_db": "background PSNR, dB", "edit_success": "edit success", "seconds": "seconds per picture"}
    if not found:
        return NONE_YET
    rows = [f"| {name} | " + " | ".join(shown(found[way][column]) for column in columns) + " |" for way, name in ways.items()]
    return "\n".join([f"| way back | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns), *rows])


def tables() -> dict[str, str]:
    """Name of the marked place -> its content."""
    results = {path.stem: figures.read(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))}
    scores = figures.read(ROOT / "mini" / "scores.json")
    compared = scores.pop("inversion_repairs", {})
    return {"scores": table(scores), "repairs": repairs(compared), "benchmarks": table(results)}


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
