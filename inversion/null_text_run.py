"""Null-text optimisation of a MODEL, inside the host's own sampling path.

The host's guider runs a "sampler" that trains prompts. So conditioning, ControlNet on the positive, model loading and
offloading, and clean-up after Cancel are the host's; only the network is called through a private twin (`gradients`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import comfy.conds
import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..versatile_diffusion.model import DUAL, FLOW, RATIO
from .checks import check_conditioning
from .gradients import CHECKPOINTING, differentiable_options, memory_needed, private_model, room_needed, tries, with_room
from .null_text import Branch, NullStep, Settings, optimise
from .ranges import step_ranges
from .trajectory import Trajectory, start_latent

REFUSED = {"area": "an area", "mask": "a mask", "hooks": "hooks (a LoRA or weights of its own)", "gligen": "GLIGEN boxes"}


@dataclass(frozen=True)
class NullText:
    """What `run_null_text` found.

    conditioning: host CONDITIONING, one entry per step, each limited to its part of the run. steps: N steps, tensors on the CPU. before: the same
    of sampling with the prompt as it was, at the same guidance. checkpointing: whether it was used. seconds: of the whole.
    """

    conditioning: list
    trajectory: Trajectory
    settings: Settings
    steps: list[NullStep]
    before: list[NullStep]
    checkpointing: bool
    seconds: float


def check_settings(settings: Settings) -> None:
    """Raises ValueError, one sentence, for settings that cannot be used."""
    if not math.isfinite(settings.guidance) or math.isclose(settings.guidance, 1.0):
        raise ValueError(
            f"Null-text optimisation corrects guided sampling, but guidance is {settings.guidance:g}, where the negative prompt has no part: "
            "set it to the cfg of the later sampler (7.5 is usual)."
        )
    if settings.inner_steps < 1:
        raise ValueError(f"Null-text optimisation needs at least 1 inner step, but inner_steps is {settings.inner_steps}: 10 is usual.")
    if not settings.learning_rate > 0 or not settings.early_stop >= 0:
        raise ValueError(
            f"Null-text optimisation needs a learning rate above 0 and an early_stop of 0 or more, but they are {settings.learning_rate:g} and "
            f"{settings.early_stop:g}: 0.01 and 1e-5 are usual."
        )
    if settings.checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is one of {', '.join(CHECKPOINTING)}, not {settings.checkpointing!r}.")


def check_prompts(positive: list, negative: list, rows: int, what: str) -> None:
    """Raises ValueError, one sentence, for CONDITIONING that null-text optimisation cannot run with; rows: pictures of the trajectory."""
    for conditioning, name in ((positive, what), (negative, "negative")):
        for _, options in conditioning:
            for key, meaning in REFUSED.items():
                if options.get(key) is not None:
                    raise ValueError(
                        f"The {name} conditioning carries {meaning}, but null-text optimisation takes a prompt for the whole picture alone: "
                        "connect one without."
                    )
    if any(options.get("control") is not None and options.get("control_apply_to_uncond", False) for _, options in positive):
        raise ValueError(
            f"The ControlNet of the {what} conditioning acts on the negative prompt as well, and no gradient passes through it: "
            "use the node Apply ControlNet, and its positive output alone."
        )
    if any(options.get("control") is not None for _, options in negative):
        raise ValueError("The negative conditioning carries a ControlNet, and no gradient passes through it: connect the plain empty prompt.")
    if len(negative) != 1 or negative[0][0] is None:
        raise ValueError(
            f"Null-text optimisation starts from one empty prompt, but the negative conditioning has {len(negative)} parts"
            f"{' without text tokens' if len(negative) == 1 else ''}: connect a CLIP Text Encode with no text."
        )
    options = negative[0][1]
    if options.get(FLOW) == DUAL and float(options.get(RATIO, 1.0)) <= 0.0:
        # the main tokens, which are trained, are the text's, and the model would never read them
        raise ValueError("The negative conditioning blends text and picture at ratio 0, where its words have no effect: connect the negative of the picture alone.")
    if negative[0][0].shape[0] not in (1, rows):
        raise ValueError(
            f"The negative conditioning holds {negative[0][0].shape[0]} prompts, but the trajectory {rows} picture{'s' if rows > 1 else ''}: "
            "connect one empty prompt for all."
        )


class _Training(comfy.samplers.Sampler):
    """Stands where a sampler stands in the host's run; afterwards `before`, `steps` and `checkpointing` hold what came of it."""

    def __init__(self, trajectory: Trajectory, tokens: Tensor, settings: Settings, needed: float, show: Callable, say: Callable[[str], None] | None):
        self.trajectory, self.tokens, self.settings, self.needed, self.show, self.say = trajectory, tokens, settings, needed, show, say
        self.total = total_calls(trajectory, settings)
        self.before: list[NullStep] = []
        self.steps: list[NullStep] = []
        self.checkpointing = False

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        # out of the host's inference mode: what is made in it can never be part of a backward pass
        with torch.inference_mode(False), torch.enable_grad():
            options = differentiable_options(extra_args["model_options"])
            branch = self._branch(model_wrap, private_model(model_wrap.inner_model), options)
            plain = dataclasses.replace(self.settings, inner_steps=0)
            for step in self._steps(branch, noise.device, plain):
                self.before.append(step)
                self._show(step.index, step.denoised)
            for checkpointing in tries(self.settings.checkpointing, self.needed, noise.device):
                self.checkpointing, self.steps = checkpointing, []
                try:
                    self._train(model_wrap, options, noise.device, disable_pbar)
                    break
                except torch.cuda.OutOfMemoryError:
                    if self.settings.checkpointing != "auto" or checkpointing:
                        raise
                # here, where the failed attempt's tensors are gone
                comfy.model_management.soft_empty_cache()
        return self.steps[-1].latent.to(noise.device)

    def _train(self, guider, options: dict, device, disable_pbar: bool) -> None:
        branch = self._branch(guider, private_model(guider.inner_model, self.checkpointing), options)
        count = self.trajectory.steps
        with tqdm(total=count, disable=disable_pbar) as bar:

            def tell(index: int, inner: int, losses: Tensor, denoised: Tensor) -> None:
                loss = float(losses.max())
                bar.set_postfix(loss=f"{loss:.2e}", inner=inner)
                if self.say is not None:
                    self.say(f"Step {index + 1} of {count}: loss {loss:.2e}, training {inner} of {self.settings.inner_steps}")
                self._show(count + index * self.settings.inner_steps + inner - 1, denoised)

            for step in self._steps(branch, device, self.settings, tell):
                self.steps.append(step)
                # a step that stopped early jumps ahead
                self._show(count + (step.index + 1) * self.settings.inner_steps - 1, step.denoised)
                bar.update()

    def _steps(self, branch: Branch, device, settings: Settings, tell=None):
        latents = self.trajectory.latents.flip(0).to(device)
        levels = self.trajectory.sigmas.flip(0).tolist()
        for step in optimise(branch, latents[0], latents[1:], levels, self.tokens.to(device), settings, tell):
            yield dataclasses.replace(step, **{name: getattr(step, name).to("cpu") for name in ("tokens", "latent", "denoised", "loss", "inner")})

    def _show(self, position: int, denoised: Tensor) -> None:
        with torch.no_grad():
            self.show(min(position, self.total - 1), denoised, denoised, self.total)

    def _branch(self, guider, private, options: dict) -> Branch:
        positive, (entry,) = guider.conds["positive"], guider.conds["negative"]

        def predict(conds: list, y: Tensor, levels: Tensor) -> list[Tensor]:
            comfy.model_management.throw_exception_if_processing_interrupted()
            found = comfy.samplers.calc_cond_batch(private, conds, y, levels, options)
            # asked again because older hosts do not ask inside the network, and this may have been the last call
            comfy.model_management.throw_exception_if_processing_interrupted()
            return found

        def branch(y: Tensor, sigma: float):
            levels = y.new_full((y.shape[0],), sigma)
            with torch.no_grad():
                conditional = predict([positive, None], y, levels)[0]

            def guided(tokens: Tensor) -> Tensor:
                negative = [{**entry, "model_conds": {**entry["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(tokens)}}]
                unconditional = predict([None, negative], y, levels)[1]
                # the host's own way from two predictions to one, with whatever guidance other nodes have put there
                given = {**options, "sampler_calc_cond_batch_function": lambda args: [conditional, unconditional]}
                return comfy.samplers.sampling_function(private, y, levels, negative, positive, self.settings.guidance, model_options=given)

            return guided

        return branch


def total_calls(trajectory: Trajectory, settings: Settings) -> int:
    """Length of the progress bar: one call per step without training, then up to inner_steps per step."""
    return trajectory.steps * (1 + settings.inner_steps)


@torch.no_grad()
def run_null_text(
    model, trajectory: Trajectory, negative: list, positive: list | None = None, settings: Settings | None = None, say: Callable[[str], None] | None = None
) -> NullText:
    """Train the unconditional prompt of every step of `trajectory` with `model` (MODEL).

    negative: CONDITIONING of the empty prompt, where training starts. positive: default the trajectory's own. say: gets a line
    of text after each training. The weights are used where they are, cast to float32 layer by layer, and are left as they were.

    Raises ValueError, one sentence, for input that cannot be used, a model that did not make the trajectory, or a loss that is no number, and the
    host's interrupt on Cancel; nothing is left behind in either case.
    """
    from ..attention_patches.reference_pass import edits_of

    settings = settings or Settings()
    check_settings(settings)
    trajectory.check_model(model)
    if edits_of(model):
        raise ValueError("The MODEL carries an edit of this pack, but null-text optimisation wants it without: connect the MODEL from before the editing node.")
    what = "trajectory's" if positive is None else "positive"
    positive = trajectory.conditioning if positive is None else positive
    check_conditioning(model, positive, negative, settings.guidance, what)
    check_prompts(positive, negative, trajectory.latents.shape[1], what)
    ranges = step_ranges(model.get_model_object("model_sampling"), trajectory.sigmas.flip(0))

    started = time.perf_counter()
    start = start_latent(trajectory, model, check=False)["samples"]
    with torch.inference_mode(False):
        tokens = negative[0][0].detach().to("cpu", torch.float32, copy=True).expand(len(start), -1, -1)
    options = {key: value for key, value in negative[0][1].items() if key not in ("start_percent", "end_percent")}
    shape = tuple(start.shape)
    full, room = memory_needed(model, trajectory.architecture, shape, False), room_needed(model, trajectory.architecture, shape, settings.checkpointing)
    guider = comfy.samplers.CFGGuider(with_room(model, room, "palimpsest_null_text"))
    guider.inner_set_conds({"positive": positive, "negative": [[tokens, options]]})
    guider.set_cfg(settings.guidance)
    show = latent_preview.prepare_callback(model, total_calls(trajectory, settings))
    training = _Training(trajectory, tokens, settings, full, show, say)
    guider.sample(torch.zeros_like(start), start, training, trajectory.sigmas.flip(0), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=0)
    entries = [[step.tokens, {**options, "start_percent": first, "end_percent": last}] for step, (first, last) in zip(training.steps, ranges)]
    return NullText(entries, trajectory, settings, training.steps, training.before, training.checkpointing, time.perf_counter() - started)
