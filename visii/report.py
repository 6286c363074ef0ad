"""Words of a learning run, and what of it is kept with the instruction."""

from __future__ import annotations

from dataclasses import asdict

from .learn_run import Result

HOW = {
    "validation": "the smallest error on a fixed validation set",
    "late average": "the mean of the last quarter of the steps",
    "last": "the last step",
    "lowest step loss": "the smallest error of a single step, as published (mostly a matter of which timesteps came by)",
}


def third(values: list[float], part: int) -> float:
    """Mean of the first (0) or last (-1) third of the values."""
    count = max(1, len(values) // 3)
    chosen = values[:count] if part == 0 else values[-count:]
    return sum(chosen) / len(chosen)


def describe(result: Result) -> str:
    """The report of a learning run, a few lines of plain text."""
    settings, record, start = result.settings, result.record, result.start
    count, height, width = result.pairs.before.shape[:3]
    lines = [
        f"Instruction learned from {count} pair{'s' if count > 1 else ''} of {width} x {height} px in {len(record.errors)} of {len(result.order)} steps at "
        f"guidance {settings.text_scale:g} (text) and {settings.image_scale:g} (image), learning rate {settings.learning_rate:g}, seed {settings.seed}",
        f"Start: \"{start.text}\"; its {start.end - 1} word position{'s' if start.end > 2 else ''} of {start.tokens.shape[1]} were learned",
        f"Model: {result.architecture}, 8 input channels; gradient checkpointing {'on' if result.checkpointing else 'off'}",
        f"Squared error of the noise: mean {third(record.errors, 0):.4g} in the first third of the steps, {third(record.errors, -1):.4g} in the last",
    ]
    if record.checks:
        best = min(value for _, value in record.checks)
        lines.append(f"Validation error relative to the start text: {record.checks[-1][1]:.3f} at the end, {best:.3f} at its best")
    lines.append(f"Result: {HOW[settings.choice]}, {record.best_step} steps made")
    if record.best_step == 0:
        lines.append("Note: no state was better than the start text, which is given unchanged; try more steps or another learning rate.")
    if result.alike is not None:
        before, after = result.alike
        weight = f"weight {settings.direction_weight:g}" if settings.direction_weight else "not part of the loss"
        lines.append(f"Direction similarity of instruction and edit: {before:.3f} at the start, {after:.3f} now ({weight})")
    else:
        lines.append(f"Direction loss: off, {result.direction.reason}")
    if record.stopped:
        lines.append(f"Note: learning stopped early because {record.stopped}; the result is the last good state. Lower the learning rate.")
    lines.append(f"Time: {result.seconds:.1f} s")
    lines.append(
        f"Use: positive of InstructPix2Pix Conditioning with a new picture, image scale {settings.image_scale:g}, a sampler with cfg {settings.text_scale:g} or a little more"
    )
    return "\n".join(lines)


def information(result: Result, fingerprint: str) -> dict:
    """What is kept with the instruction: settings, model, pictures (hashes) and errors, JSON-able."""
    return {
        **{key: value for key, value in asdict(result.settings).items() if key != "preview_every"},
        "model": fingerprint, "architecture": result.architecture, "pictures": result.pairs.hashes, "chosen_step": result.record.best_step,
        "errors": [float(f"{value:.6g}") for value in result.record.errors], "validation": [[made, float(f"{value:.6g}")] for made, value in result.record.checks],
        "direction_similarity": result.alike, "stopped": result.record.stopped, "start": result.start.text,
    }
