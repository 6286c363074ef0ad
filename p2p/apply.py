"""From two prompts to an edited MODEL: encoding, checks, the edit, the report."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass

import torch

from ..attention_patches import host
from ..attention_patches.blocks import check_reads_words, unet_layers
from ..attention_patches.pnp import BRANCH
from ..attention_patches.reference_pass import add_edits
from ..attention_patches.source import CoevolvingSource, Source, check_conditioning
from .edit import P2PEdit, small_self_points
from .plan import AlignmentPlan, make_plan
from .syntax import parse_weights, parse_windows
from .tokens import read_tokens

SEPARATOR = "---"  # a line of its own between edit prompts


@dataclass(frozen=True)
class Settings:
    """How a pair of prompts is edited. Windows are (start, end) fractions of the run, from the noisy end.

    mode: "auto", "replace", "refine" or "reweight". tail: "aligned" or "published", of the replacement mapper. words, weights: in the small
    syntax of `syntax.py`. self_share: see `edit.small_self_points`.
    """

    mode: str = "auto"
    cross: tuple[float, float] = (0.0, 0.8)
    self_window: tuple[float, float] = (0.0, 0.4)
    words: str = ""
    weights: str = ""
    self_share: float = 0.25
    tail: str = "aligned"


@dataclass(frozen=True)
class Controlled:
    """What `apply_p2p` gives: the MODEL, CONDITIONING of the edit prompt(s) and of the source prompt, the report and the plans behind it."""

    model: object
    positive: list
    source: list
    report: str
    plans: tuple[AlignmentPlan, ...]


def split_prompts(text: str) -> list[str]:
    """The edit prompts of a text in which lines of three dashes separate them."""
    prompts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == SEPARATOR:
            prompts.append([])
        else:
            prompts[-1].append(line)
    found = ["\n".join(lines).strip() for lines in prompts]
    while len(found) > 1 and not found[-1]:
        found.pop()  # a separator after the last prompt
    return found


def encode(clip, prompts: list[str]) -> list:
    """CONDITIONING of a batch of prompts [E, T, D], by the host's text encoder. Raises ValueError when they need different numbers of tokens."""
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
    if len(encoded) == 1:
        return encoded[0]
    if any(len(entries) != len(encoded[0]) for entries in encoded):
        raise ValueError("The edit prompts are encoded in different numbers of steps by this CLIP's hooks: use one controller per edit prompt.")
    joined = []
    for parts in zip(*encoded):
        lengths = sorted({int(tokens.shape[1]) for tokens, _ in parts})
        if len(lengths) > 1:
            raise ValueError(
                f"The edit prompts need {' and '.join(map(str, lengths))} text tokens, but a batch shares one length: "
                "shorten the long ones, or use one controller per edit prompt."
            )
        extra = dict(parts[0][1])
        if extra.get("pooled_output") is not None:
            extra["pooled_output"] = torch.cat([options["pooled_output"] for _, options in parts])
        joined.append([torch.cat([tokens for tokens, _ in parts]), extra])
    return joined


def apply_p2p(
    model, clip, source_prompt: str, edit_prompt: str, settings: Settings, *, trajectory=None, source_conditioning: list | None = None, bank_device: str = "auto"
) -> Controlled:
    """A clone of `model` that edits what it generates from the edit prompt after the attention of the source prompt.

    model: ModelPatcher; clip: its CLIP. trajectory: of the picture to edit (inversion.trajectory.Trajectory), None for the picture that the source
    prompt gives from the same noise. source_conditioning: replaces the encoding of the source prompt (the same words, with a ControlNet,
    say). Raises ValueError, one sentence, for anything that does not fit together. Neutral settings give `model` itself.
    """
    if clip is None:
        raise ValueError("There is no CLIP: connect that of the checkpoint (some checkpoints bring none, then use a CLIP loader).")
    layers = unet_layers(model)
    check_reads_words(model)
    crosses = layers.points("attn2")
    if not crosses:
        raise ValueError("This model has no cross-attention that a prompt could be edited in: connect an SD1.x, SD2.x or SDXL checkpoint.")
    if trajectory is not None:
        trajectory.check_model(model)
    for name, (start, end) in (("cross", settings.cross), ("self", settings.self_window)):
        if not 0.0 <= start <= end <= 1.0:
            raise ValueError(f"The {name} window goes from {start:g} to {end:g}, but it needs two fractions of the run between 0 and 1, the start first.")
    prompts = split_prompts(edit_prompt)
    source_tokens, targets = read_tokens(clip, source_prompt), [read_tokens(clip, prompt) for prompt in prompts]
    words, weights = parse_windows(settings.words), parse_weights(settings.weights)
    plans = tuple(
        make_plan(source_tokens, target, settings.mode, settings.tail, settings.cross, _of(words, target, targets), _of(weights, target, targets), settings.self_window)
        for target in targets
    )
    positive = encode(clip, prompts)
    source = encode(clip, [source_prompt]) if source_conditioning is None else source_conditioning
    if source_conditioning is None and any("hooks" in extra for _, extra in source) and trajectory is not None:
        raise ValueError("The CLIP carries hooks (Set CLIP Hooks), but an inverted source is run without them: connect the CLIP from before that node.")
    if source_conditioning is not None or trajectory is not None:
        check_conditioning(source, host.token_width(model), "source")
    if any(tokens is not None and tokens.shape[1] != source_tokens.length for tokens, _ in source):
        raise ValueError(f"The source conditioning has other text tokens than the source prompt, which has {source_tokens.length}: connect an encoding of the same prompt.")
    report = [plan.describe() for plan in plans]
    mark = uuid.uuid4().hex
    # marked even when nothing is installed: in a chain of controllers this prompt is no stranger then
    marked = [[tokens, {**extra, host.MARK: mark}] for tokens, extra in positive]
    if all(plan.neutral for plan in plans):
        report.append("no effect: nothing is installed, because the prompts and settings leave nothing to edit")
        host.log.info("Palimpsest: P2P has nothing to edit with these prompts and settings, the model is left as it is.")
        return Controlled(model, marked, source, "\n\n".join(report), plans)
    branches = ((BRANCH, source),)
    edit = P2PEdit(
        source=CoevolvingSource(None, branches, source_conditioning is None) if trajectory is None else Source(trajectory, branches),
        bank_device=bank_device,
        plans=plans,
        mark=mark,
        layers=layers,
        self_share=settings.self_share,
        schedule=None if trajectory is None else trajectory.sigmas,
    )
    report.append(_installed(edit, layers, trajectory, source))
    return Controlled(add_edits(model, edit), marked, source, "\n\n".join(report), plans)


def _of(values: dict, target, targets: list) -> dict:
    """The entries whose words this prompt has, where several prompts share the widgets; a word that no prompt has stays, to be refused."""
    return {word: value for word, value in values.items() if target.positions(word) or not any(other.positions(word) for other in targets)}


def _installed(edit: P2PEdit, layers, trajectory, source: list) -> str:
    lines = [f"model: {layers.architecture}", f"cross-attention: {len(layers.points('attn2'))} layers are edited"]
    if trajectory is None:
        sizes = ", ".join(f"{side[0]} x {side[1]} at {pixels} px" for pixels in (512, 1024) for side in [small_self_points(layers, (pixels // 8, pixels // 8), edit.self_share)[1]])
        lines.append(f"self-attention: maps up to {edit.self_share:g} of the latent's sides ({sizes}), never below 8 x 8; the log names the size of each run")
        lines.append("source: generated beside the run, from the same noise and with the run's guidance; exact under euler and ddim, the euler picture of this seed under others")
        return "\n".join(lines)
    small, limit = small_self_points(layers, tuple(trajectory.latents.shape[-2:]), edit.self_share)
    lines.append(f"self-attention: {len(small)} layers, maps up to {limit[0]} x {limit[1]}")
    lines.append(f"source: the trajectory's latents at each of its {trajectory.steps} steps (direct inversion)")
    if trajectory.conditioning and not _same_text(trajectory.conditioning, source):
        lines.append("note: the trajectory was inverted with another prompt than the source prompt; with the same one the source's attention is truer")
    return "\n".join(lines)


def _same_text(first: list, second: list) -> bool:
    a, b = first[0][0], second[0][0]
    return a is not None and b is not None and a.shape == b.shape and math.isclose(float((a.float() - b.float()).norm()), 0.0, abs_tol=1e-3 * float(b.float().norm()))
