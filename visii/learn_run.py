"""Learning an instruction with a MODEL, inside the host's own sampling path.

The host's guider runs a "sampler" that trains, as for null-text inversion: conditioning, model loading and offloading and the clean-up after
Cancel are the host's, the network is called through a private twin (`inversion.gradients`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attention_patches.blocks import architecture_name
from ..attention_patches.host import token_width
from ..instruct_pix2pix.checks import check_edit_model
from ..instruct_pix2pix.conditioning import with_image
from ..inversion.gradients import CHECKPOINTING, differentiable_options, memory_needed, private_model, room_needed, tries, with_room
from .direction import Direction
from .instruction import Instruction, check_same_encoder
from .learn import CHOICES, Record, Settings, learn
from .objective import similarity, timesteps
from .pairs import Pairs
from .step import PREVIEW_STEPS, Step

NODE = "Visii Learn Instruction"


@dataclass
class Result:
    """What `run_learn` found.

    instruction: the chosen state. record: of the run. previews: (steps made, latent [1, C, h, w] in sampler scaling, CPU) pairs, the result last.
    alike: cosine with the edit's direction of the start and of the result, None without a direction term. checkpointing: whether it was used. seconds: of the whole.
    """

    instruction: Instruction
    start: Instruction
    settings: Settings
    record: Record
    order: list[int]
    direction: Direction
    pairs: Pairs
    architecture: str
    previews: list[tuple[int, Tensor]] = field(default_factory=list)
    alike: tuple[float, float] | None = None
    checkpointing: bool = False
    seconds: float = 0.0


def check_settings(settings: Settings) -> None:
    """Raises ValueError, one sentence, for settings that cannot be used."""
    numbers = {"learning_rate": settings.learning_rate, "text_guidance": settings.text_scale, "image_guidance": settings.image_scale,
               "mse_weight": settings.mse_weight, "direction_weight": settings.direction_weight}
    wrong = next((name for name, value in numbers.items() if not math.isfinite(value) or value < 0.0), None)
    if wrong:
        raise ValueError(f"Learning an instruction needs numbers of 0 or more, but {wrong} is {numbers[wrong]:g}.")
    if settings.steps < 1 or settings.learning_rate == 0.0 or settings.text_scale == 0.0 or settings.mse_weight == 0.0:
        raise ValueError(
            f"Learning an instruction needs steps, learning_rate, text_guidance and mse_weight above 0, but they are {settings.steps}, {settings.learning_rate:g}, "
            f"{settings.text_scale:g} and {settings.mse_weight:g}: 1000, 0.001, 7.5 and 4 are published."
        )
    if settings.choice not in CHOICES:
        raise ValueError(f"The result is chosen by one of {', '.join(CHOICES)}, not {settings.choice!r}.")
    if settings.checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is one of {', '.join(CHECKPOINTING)}, not {settings.checkpointing!r}.")


class _Training(comfy.samplers.Sampler):
    """Stands where a sampler stands in the host's run; afterwards `result` is filled."""

    def __init__(self, result: Result, needed: float, total: int, show: Callable, say: Callable[[str], None] | None):
        self.result, self.needed, self.total, self.show, self.say = result, needed, total, show, say

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        # out of the host's inference mode: what is made in it can never be part of a backward pass
        with torch.inference_mode(False), torch.enable_grad():
            options = differentiable_options(extra_args["model_options"])
            targets = latent_image.clone()
            for checkpointing in tries(self.result.settings.checkpointing, self.needed, noise.device):
                self.result.checkpointing, self.result.record, self.result.previews = checkpointing, Record(), []
                try:
                    self._train(Step(model_wrap, private_model(model_wrap.inner_model, checkpointing), options, targets, self.result.settings), disable_pbar)
                    break
                except torch.cuda.OutOfMemoryError:
                    if self.result.settings.checkpointing != "auto" or checkpointing:
                        raise
                # here, where the failed attempt's tensors are gone
                comfy.model_management.soft_empty_cache()
        return latent_image

    def _train(self, step: Step, disable_pbar: bool) -> None:
        result, settings, device = self.result, self.result.settings, step.targets.device
        start = result.start.tokens.to(device)
        direction = (result.direction.vector.to(device), result.direction.projection.to(device)) if result.direction.on else None
        validate = step.validation() if settings.choice == "validation" else None
        done = 0
        with tqdm(total=len(result.order), disable=disable_pbar) as bar:
            for learned in learn(step.branch, result.order, start, result.start.end, settings, result.record, direction, validate):
                made, done = learned.index + 1, done + 1
                bar.set_postfix(loss=f"{learned.error:.2e}")
                bar.update()
                self._show(done, step.denoised)
                if self.say is not None:
                    recent = result.record.errors[-20:]
                    self.say(f"Step {made} of {len(result.order)}: error of the noise {sum(recent) / len(recent):.4f} (mean of {len(recent)})")
                if settings.preview_every and made % settings.preview_every == 0 and made < len(result.order):
                    done = self._preview(step, learned.tokens, made, done)
        chosen = result.record.best
        if settings.preview_every:
            done = self._preview(step, chosen, result.record.best_step, done)
        # a run that stopped early jumps ahead
        self._show(self.total, step.denoised)
        if direction is not None:
            with torch.no_grad():
                result.alike = tuple(float(similarity(tokens, *direction)) for tokens in (start, chosen))

    def _preview(self, step: Step, tokens: Tensor, made: int, done: int) -> int:
        """Sample the first pair's picture with `tokens`; returns the new state of the progress bar."""
        frames = []
        for y, denoised in step.sampled(tokens):
            done += 1
            self._show(done, denoised)
            frames = [y]
        self.result.previews.append((made, frames[0].to("cpu", torch.float32)))
        return done

    def _show(self, position: int, denoised: Tensor | None) -> None:
        if denoised is not None:
            with torch.no_grad():
                self.show(min(position, self.total) - 1, denoised, denoised, self.total)


def total_steps(settings: Settings) -> int:
    """Length of the progress bar: training steps, then the steps of each preview."""
    previews = (settings.steps - 1) // settings.preview_every + 1 if settings.preview_every else 0
    return settings.steps + previews * PREVIEW_STEPS


def prepare(model, start: Instruction, pairs: Pairs, null: tuple[Tensor, dict]) -> dict[str, list]:
    """The two lists of CONDITIONING that a guider processes: the instruction and the empty text, each with the pictures before."""
    return {"positive": with_image(start.conditioning, pairs.image), "negative": with_image([list(null)], pairs.image)}


@torch.no_grad()
def run_learn(model, pairs: Pairs, start: Instruction, null: tuple[Tensor, dict], settings: Settings | None = None, direction: Direction | None = None,
              say: Callable[[str], None] | None = None) -> Result:
    """Learn an instruction that turns the pairs' pictures before into those after, with `model` (an edit MODEL).

    start: where learning starts. null: (tokens, options) of the same encoder's empty text. say: gets a line of text per step. The
    weights are used where they are, cast to float32 layer by layer, and are left as they were.

    Raises ValueError, one sentence, for input that cannot be used or a loss that is no number at the first step, and the host's interrupt on
    Cancel; nothing is left behind in either case.
    """
    from ..attention_patches.reference_pass import edits_of

    settings = settings or Settings()
    check_settings(settings)
    check_edit_model(model, NODE)
    if edits_of(model):
        raise ValueError("The MODEL carries an edit of this pack, but an instruction is learned without: connect the MODEL from before the editing node.")
    check_same_encoder(start, null[0], "the connected CLIP")
    if start.end is None:
        raise ValueError("This instruction's file does not say which positions are its words, so it cannot be learned on: give Load Instruction the start text.")
    if start.end == 1:
        raise ValueError("The instruction has no words, and only their positions are learned: start from a text.")
    width = token_width(model)
    if width is not None and start.width != width:
        raise ValueError(f"The text encoder gives {start.width} values per token, but the model takes {width}: connect the CLIP of the edit model's checkpoint.")

    began = time.perf_counter()
    architecture = architecture_name(model)
    latent = pairs.target.clone()
    order = timesteps(settings.steps, len(model.get_model_object("model_sampling").sigmas), settings.seed)
    result = Result(start, start, settings, Record(), order, direction or Direction(reason="it was not asked for"), pairs, architecture)
    shape = (1, *latent.shape[1:])
    full, room = memory_needed(model, architecture, shape, False), room_needed(model, architecture, shape, settings.checkpointing)
    guider = comfy.samplers.CFGGuider(with_room(model, room, "palimpsest_visii"))
    guider.inner_set_conds(prepare(model, start, pairs, null))
    guider.set_cfg(settings.text_scale)
    total = total_steps(settings)
    training = _Training(result, full, total, latent_preview.prepare_callback(model, total), say)
    sigmas = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    guider.sample(torch.zeros_like(latent), latent, training, sigmas, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=settings.seed)
    result.instruction = start.with_tokens(result.record.best)
    result.seconds = time.perf_counter() - began
    return result
