"""The one module that knows the host's slots: wrapper names, option dictionaries, lists of conditioning.

Everything here uses public names of ComfyUI (0.3.52 and 0.3.75). When the host changes, the fix belongs here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any, Callable

import torch

from .rows import Area

log = logging.getLogger("palimpsest")

SAME_SIGMA = 1e-4  # relative; schedules of the host and of others agree to about 1e-6
KEY = "palimpsest"  # our key for wrappers and callbacks, and for the run's state in transformer_options
PLAN = "palimpsest_plan"  # what the current call is to inject
ROLE = "palimpsest_role"  # tag on conditioning entries: name of the list they belong to
MARK = "palimpsest_mark"  # tag on CONDITIONING made by a node of ours: which edit it belongs to


def set_wrapper(model, wrapper_type: str, wrapper: Callable) -> None:
    """Put the only wrapper of ours of this type on `model` (a fresh clone), in place of an older one.

    In place, because the order of keys is the order of wrappers: edits added later must not move us behind other packs.
    """
    model.wrappers.setdefault(wrapper_type, {})[KEY] = [wrapper]


def set_wrapper_outside(model, wrapper_type: str, key: str, wrapper: Callable | None) -> None:
    """Put the only wrapper under another key of ours on `model` (a fresh clone) around those of edits, whichever node comes first; None takes it away."""
    table = model.wrappers.setdefault(wrapper_type, {})
    others = {name: list(wrappers) for name, wrappers in table.items() if name != key}
    table.clear()
    for name, wrappers in others.items():
        if name == KEY and wrapper is not None:
            table[key] = [wrapper]
        table[name] = wrappers
    if wrapper is not None:
        table.setdefault(key, [wrapper])


def set_callback(model, callback_type: str, callback: Callable) -> None:
    """The same for callbacks."""
    model.callbacks.setdefault(callback_type, {})[KEY] = [callback]


def options_with_apply_wrapper(model_options: dict, wrapper: Callable, **values: Any) -> dict:
    """A copy of `model_options` with an innermost APPLY_MODEL wrapper and `values` in transformer_options.

    Objects in `values` must be plain: the host copies dicts and lists on the way to the UNet.
    """
    import comfy.model_patcher
    import comfy.patcher_extension as extension

    options = comfy.model_patcher.create_model_options_clone(model_options)
    extension.add_wrapper_with_key(extension.WrappersMP.APPLY_MODEL, KEY, wrapper, options, is_model_options=True)
    options["transformer_options"].update(values)
    return options


def options_with_attention_patch(transformer_options: dict, patch: Callable, kinds: set[str]) -> dict:
    """A copy of a UNet call's transformer_options with `patch` before all other patches of attention inputs.

    kinds: "attn1" and/or "attn2"; patch is called as (kind, n, context, value, extra_options).
    Before, because HyperTile and token merging change the tokens, and their second patch undoes what the first did.
    """
    patches = dict(transformer_options.get("patches", {}))
    for kind in kinds & {"attn1", "attn2"}:
        patches[f"{kind}_patch"] = [functools.partial(patch, kind), *patches.get(f"{kind}_patch", [])]
    return {**transformer_options, "patches": patches}


def options_with_replacers(transformer_options: dict, replacers: dict[tuple[str, str, int, int], Callable]) -> dict:
    """A copy of a UNet call's transformer_options with late replacements of attentions.

    replacers: by (kind, part, number, index); each is called as (below, q, k, v, extra_options) where `below` is what sits in the
    slot already, called as (q, k, v, extra_options), or the host's attention. One slot holds one replacement, and one for a
    transformer block hides one for its layer, therefore ours take what is there along.
    """
    replace = {kind: dict(table) for kind, table in transformer_options.get("patches_replace", {}).items()}
    for (kind, *block), replacer in replacers.items():
        table = replace.setdefault(kind, {})
        there = table.get(tuple(block)) or table.get(tuple(block[:2])) or attention
        table[tuple(block)] = functools.partial(replacer, there)
    return {**transformer_options, "patches_replace": replace}


@functools.cache
def _takes_options(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters
    return "transformer_options" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
    """The host's fused attention on projected tensors [rows, tokens, heads * dim], with the settings of the block that asks.

    Never with a mask: SageAttention leaves masks out without a word, FlashAttention takes none.
    """
    from comfy.ldm.modules.attention import optimized_attention

    # 0.3.52 knows no overrides of its attention yet
    more = {"transformer_options": extra_options} if _takes_options(optimized_attention) else {}
    return optimized_attention(q, k, v, extra_options["n_heads"], attn_precision=extra_options.get("attn_precision"), **more)


def uncompiled():
    """Context in which torch.compile's graphs are left aside, for UNet calls that carry our patches.

    A graph compiled without forward hooks is reused when hooks are there, silently and wrongly: torch does not guard on them.
    Costs nothing, and imports nothing, while nobody compiles. Needs torch 2.6.
    """
    compiling = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext()


def _block(base_model, part: str, number: int):
    unet = base_model.diffusion_model
    return unet.middle_block if part == "middle" else (unet.input_blocks if part == "input" else unet.output_blocks)[number]


def residual_convolution(base_model, part: str, number: int) -> torch.nn.Module:
    """Last convolution of the ResBlock that opens a block: its output is the residual branch before the skip is added."""
    return _block(base_model, part, number)[0].out_layers[-1]


def attention_module(base_model, kind: str, part: str, number: int, index: int) -> torch.nn.Module:
    """The attention ("attn1" or "attn2") of a transformer block, with its projections to_q, to_k, to_v."""
    layer = next(layer for layer in _block(base_model, part, number) if hasattr(layer, "transformer_blocks"))
    return getattr(layer.transformer_blocks[index], kind)


@contextlib.contextmanager
def residual_hooks(base_model, hooks: dict[tuple[str, int], Callable]) -> Iterator[None]:
    """Context of one UNet call in which forward hooks sit on the residual branches of the blocks (part, number).

    The modules are shared by every clone of a model, so the hooks go with the call, whatever ends it. Compiled graphs are
    left aside meanwhile.
    """
    with contextlib.ExitStack() as stack:
        for (part, number), hook in hooks.items():
            stack.callback(residual_convolution(base_model, part, number).register_forward_hook(hook).remove)
        stack.enter_context(uncompiled())
        yield


def token_width(model) -> int | None:
    """Channels of a text token that the UNet of a MODEL takes, None where it has several."""
    width = model.model.model_config.unet_config.get("context_dim")
    return width if isinstance(width, int) else None


def window(model, start: float, end: float) -> tuple[float, float]:
    """Noise levels (ceiling, floor) of a window of fractions of the schedule, as the host's own start and end percent count; without end at 0 and 1."""
    sampling = model.get_model_object("model_sampling")
    ceiling = float("inf") if start <= 0.0 else float(sampling.percent_to_sigma(start))
    return ceiling, float("-inf") if end >= 1.0 else float(sampling.percent_to_sigma(end))


def tag_roles(guider) -> None:
    """Mark each processed conditioning entry of a run with the name of its list.

    Called after the host has processed the lists: earlier marks end up on copies that the host moves across lists.
    The entries are the run's own copies.
    """
    for name, entries in guider.conds.items():
        for entry in entries:
            entry[ROLE] = name


def role_of(entries: list | None, position: int, conds: list, guider) -> str | None:
    """Name of one conditioning list of a call ("positive", "negative", ...), None if nothing says it.

    Identity of the list first; then our tag (context windows copy the lists); then the place in a pair.
    """
    for name, own in getattr(guider, "conds", {}).items():
        if entries is own:
            return name
    tags = {entry.get(ROLE) for entry in entries or []}
    if len(tags) == 1 and None not in tags:
        return tags.pop()
    return ("positive", "negative")[position] if len(conds) == 2 and entries is not None else None


def is_active(entry: dict, sigma: float) -> bool:
    """Whether a processed conditioning entry takes part at this noise level (its start and end percent)."""
    start, end = entry.get("timestep_start"), entry.get("timestep_end")
    return not (start is not None and sigma > float(start)) and not (end is not None and sigma < float(end))


def area_of(entry: dict, picture: tuple[int, int]) -> Area | None:
    """The rectangle a processed entry is limited to, clipped to the picture (H, W) as the host does; None for the whole."""
    area = entry.get("area")
    if area is None:
        return None
    height, width, y, x = (int(n) for n in (*area[:2], *area[-2:])) if len(area) == 4 else (int(n) for n in (*area[1:3], *area[4:6]))
    return Area(y, x, min(height, picture[0] - y), min(width, picture[1] - x))


def find_entry(entries: list | None, uuid: Any) -> dict | None:
    """The entry of a list that a chunk came from."""
    return next((entry for entry in entries or [] if entry.get("uuid") == uuid), None)


def process_alone(conditioning: list, model, noise: torch.Tensor, device: torch.device, **rest: Any) -> list[dict]:
    """Conditioning made ready for sampling, in a dictionary of its own.

    Beside the user's lists the host would give it their ControlNets and areas, and them its own.
    noise: tensor of the latents' shape. rest: latent_image, denoise_mask, seed.
    """
    import comfy.sampler_helpers
    import comfy.samplers

    converted = comfy.sampler_helpers.convert_cond(conditioning)
    return comfy.samplers.process_conds(model, noise, {"positive": converted}, device, **rest)["positive"]


# what stays when only the words of a processed entry change: everything but the tokens and what is pooled from them
WORDS = ("c_crossattn", "y")
PLACES = ("area", "mask", "mask_strength", "strength")


def reworded(entry: dict, words: dict) -> dict:
    """A processed entry with the words of another one, for the whole picture: ControlNet, ranges, hooks and extra channels stay."""
    kept = {key: value for key, value in entry.items() if key not in PLACES}
    named = {key: words[key] for key in ("cross_attn", "pooled_output", "uuid") if key in words}
    conds = {**entry["model_conds"], **{key: words["model_conds"][key] for key in WORDS if key in words["model_conds"]}}
    return {**kept, **named, "model_conds": conds}


def elsewhere(entry: dict, picture: dict) -> dict:
    """A processed entry's words and ranges with what belongs to another picture (sizes, extra channels), without its ControlNet.

    picture: a processed entry of that picture.
    """
    kept = {key: value for key, value in entry.items() if key != "control"}
    places = {key: value for key, value in picture["model_conds"].items() if key not in WORDS}
    return {**kept, "model_conds": {**entry["model_conds"], **places}}


def clean_controls(entries: list[dict]) -> None:
    """Let go of what the ControlNets of processed conditioning hold; the host does this for the user's lists only."""
    import comfy.sampler_helpers

    comfy.sampler_helpers.cleanup_models({"entries": entries}, [])
