"""The same Prompt-to-Prompt edits of drawn scenes under four ways back from an inversion: the table of PIE-Bench in miniature.

20 edits, 10 each of swap color and swap shape, with the recipes of the p2p score but without blend, which would hide what the ways differ in.
ddim: sampling back with guidance and the empty prompt. negative_prompt: the source prompt as the negative. null_text: a trained negative per
step. direct: the stored trajectory as the source. inversion_repairs.WAY.structure_kept: shapes, places and sizes are those of the edited
twin; .background_psnr_db: to the given picture's reconstruction, outside the objects; .edit_success; .seconds: mean of one edit with its
inversion and repair, on the machine that scored.
"""
from __future__ import annotations

import time
from collections import defaultdict

import torch

from ...inversion.null_text import Settings as NullSettings
from ...inversion.null_text_run import run_null_text
from ...inversion.run import run_inversion
from ...inversion.trajectory import clean_latent, start_latent
from ...mini.metrics import background_psnr, edit_success, structure_kept
from ...mini.reader import read
from ...p2p.apply import apply_p2p
from ..scoring import HELD_OUT, Mini, mean, pictures, rate, span
from .p2p import CFG, RECIPES, SCHEDULER, STEPS, Case, case

QUICK_LIMITS = {"inversion_repairs.direct.edit_success": 0.3}
KINDS, PER_KIND, OFFSET, APART = ("color", "shape"), 10, 300_000, 10_000
WAYS = ("ddim", "negative_prompt", "null_text", "direct")


def edited(mini: Mini, way: str, found: Case, latent: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(edited latents, latents that the inversion leads back to)."""
    source = mini.prompts([found.source])
    trajectory = run_inversion(mini.model, latent, source, steps=STEPS, scheduler=SCHEDULER).trajectory
    edit = apply_p2p(mini.model, mini.clip, found.source, found.prompt, RECIPES[found.kind].settings, trajectory=trajectory if way == "direct" else None)
    negative = {"negative_prompt": source, "null_text": None}.get(way, mini.prompts([""]))
    if way == "null_text":
        negative = run_null_text(mini.model, trajectory, mini.prompts([""]), None, NullSettings(guidance=CFG)).conditioning
    start = start_latent(trajectory, mini.model)["samples"]
    samples = mini.sample(edit.model, edit.positive, start, None, steps=STEPS, cfg=CFG, scheduler=SCHEDULER, negative=negative)
    return samples, clean_latent(trajectory, mini.model)["samples"]


def score(quick: bool) -> dict:
    """Figures of this module (see its docstring for the keys)."""
    count, mini = 1 if quick else PER_KIND, Mini()
    results = {way: defaultdict(list) for way in WAYS}
    for number, kind in enumerate(KINDS):
        first = HELD_OUT + OFFSET + APART * number
        for seed in range(first, first + count):
            found = case(kind, seed)
            latent = mini.encode(pictures([found.scene]))
            for way, values in results.items():
                started = time.monotonic()
                samples, clean = edited(mini, way, found, latent)
                values["seconds"].append(time.monotonic() - started)
                after, before = (mini.decode(latents)[0].numpy() for latents in (samples, clean))
                reading = read(after)
                values["edit_success"].append(edit_success(reading, found.target, kind, found.index))
                values["structure_kept"].append(structure_kept(reading, found.target))
                values["background_psnr_db"].append(background_psnr(after, before, reading, read(before)))
        print(f"  {kind}: {count}", flush=True)
    seeds = f"{span(HELD_OUT + OFFSET, count)} and the same + {APART}"
    out = {way: {key: (rate if isinstance(found[0], bool) else mean)(found, seeds) for key, found in values.items()} for way, values in results.items()}
    return {"inversion_repairs": out}
