"""P2P against tensors computed by the published notebooks: attention maps, blends, whole UNet runs on a small random UNet."""

import ast
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from palimpsest.attention_patches import host
from palimpsest.attention_patches.blocks import unet_layers
from palimpsest.attention_patches.pnp import BRANCH
from palimpsest.attention_patches.reference_pass import add_edits
from palimpsest.attention_patches.source import CoevolvingSource, Source
from palimpsest.inversion.trajectory import Trajectory
from palimpsest.p2p.blend import LocalBlend, blend_mask, blended
from palimpsest.p2p.edit import P2PEdit
from palimpsest.p2p.plan import make_plan
from palimpsest.p2p.tokens import read_tokens
from palimpsest.tests.helpers.models import patcher
from palimpsest.tests.helpers.prompts import WordClip

EPISODES = ("stable_refine", "stable_replace_multi_tok", "nulltext_replace_dict", "nulltext_reweight_refine")
RUNS = ("plain", "replace", "refine_blend")


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def tokens(text):
    return read_tokens(WordClip(), text)


def window(value):
    return (0.0, value) if isinstance(value, float) else tuple(value)


# ---- the controllers on random maps


@pytest.mark.parametrize("episode", EPISODES)
def test_maps_of_every_step_equal_the_published_controllers(oracles, episode):
    path = oracles / "p2p" / f"attn_{episode}.safetensors"
    tensors, meta = load_file(path), metadata(path)
    source, target = (tokens(text) for text in json.loads(meta["prompts"]))
    cross, equal, heads, steps = ast.literal_eval(meta["cross"]), ast.literal_eval(meta["eq"]), int(meta["heads"]), int(meta["steps"])
    cross = cross if isinstance(cross, dict) else {"default_": cross}
    plan = make_plan(
        source, target, "replace" if "Replace" in meta["cls"] else "refine", "published", window(cross.pop("default_", 1.0)),
        {word: window(value) for word, value in cross.items()}, {} if equal is None else {equal[0]: equal[1]}, window(ast.literal_eval(meta["self"])),
    )
    for key in [key for key in tensors if key.startswith("in.")]:
        step, kind = int(key.split(".")[1][1:]), key.split(".")[-1]
        before, after = tensors[key].double(), tensors[key.replace("in.", "out.", 1)].double()
        before, after = (maps.unflatten(0, (4, heads)) for maps in (before, after))  # rows: uncond source, uncond edit, source, edit
        assert torch.equal(after[:3], before[:3])
        expected = before[3]
        if kind == "self" and plan.self_active(step, steps):
            expected = before[2]
        elif kind == "cross":
            mapping, kept = plan.step(step, steps)
            if mapping is not None or kept is not None:
                expected = (before[2] @ mapping.double() if mapping is not None else 0.0) + (before[3] * kept.double() if kept is not None else 0.0)
        assert (after[3] - expected).abs().max() < 1e-6, key


# ---- local blend


@pytest.mark.parametrize("case", ["pair", "absent_word"])
@pytest.mark.parametrize("version", ["stable", "nulltext"])
def test_blends_equal_the_published_ones(oracles, version, case):
    """The file does not say which word was used, so it is found: exactly one column must give the mask. The source's row is left out: it is not blended."""
    tensors = load_file(oracles / "p2p" / "blend.safetensors")
    maps = torch.stack([tensors[f"store_B2.{name}"] for name in ("down_cross.2", "down_cross.3", "up_cross.0", "up_cross.1", "up_cross.2")])
    maps = maps.unflatten(1, (2, 2)).mean((0, 2)).unflatten(1, (16, 16))  # [prompt, 16, 16, 77]
    x, mask, y = (tensors[f"{version}.{case}.{name}"] for name in ("x", "mask", "y"))
    columns = [[blend_mask(maps[row : row + 1, ..., column], (64, 64), 0.3, True) for column in range(77)] for row in range(2)]
    nothing = torch.zeros_like(columns[0][0])
    wanted = mask[1:].bool()
    choices = {"pair": zip(*columns), "absent_word": [(nothing, other) for other in columns[1]]}[case]
    assert sum(torch.equal(own | other, wanted) for own, other in choices) == 1, "not one word gives this mask"
    source, edit = y[:1], x[1:]
    assert torch.allclose(y[:1], x[:1])
    assert (x[:1] + wanted.float() * (edit - x[:1]) - y[1:]).abs().max() < 1e-6
    # the same as a change of the prediction: an Euler step of the changed prediction ends at the blend of the stepped latents
    ratio, generator = 0.7, torch.Generator().manual_seed(0)
    now, there = torch.randn(1, 4, 64, 64, generator=generator).double(), torch.randn(1, 4, 64, 64, generator=generator).double()
    predicted, source_predicted = ((stepped.double() - ratio * start) / (1 - ratio) for stepped, start in ((edit, now), (source, there)))
    changed = blended(now, predicted, there, source_predicted, wanted.double(), ratio)
    assert (ratio * now + (1 - ratio) * changed - y[1:]).abs().max() < 1e-6


# ---- whole runs


@pytest.fixture(scope="module")
def model(oracles):
    import comfy.model_base
    import comfy.supported_models

    class TwoHeads(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

    folder = oracles / "pnp"
    config = TwoHeads({**json.loads((folder / "tiny_unet_config.json").read_text()), "dtype": torch.float32})
    base = comfy.model_base.BaseModel(config)
    missing, unexpected = base.diffusion_model.load_state_dict(load_file(folder / "tiny_unet_ldm.safetensors"), strict=False)
    assert not missing and not unexpected
    return patcher(base)


def alphas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


class Case:
    """One published run: tensors, noise levels, the edit's plan."""

    def __init__(self, oracles, name):
        path = oracles / "p2p" / f"unet_{name}.safetensors"
        self.tensors, meta, self.inputs = load_file(path), metadata(path), load_file(oracles / "p2p" / "unet_inputs.safetensors")
        abar = torch.cat([alphas()[self.tensors["timesteps"]], alphas()[:1]])
        self.sigmas = ((1 - abar) / abar).sqrt().float()  # the published run ends at the first noise level, not at 0
        self.scale = (1 + self.sigmas**2).sqrt()
        spec = json.loads(meta["spec"])
        self.plan = self.blend = None
        if spec is not None:
            source, target = (tokens(text) for text in spec["prompts"])
            weights = {spec["eq"][0]: spec["eq"][1]} if spec["eq"] else {}
            mode = "replace" if "Replace" in spec["cls"] else "refine"
            self.plan = make_plan(source, target, mode, "published", (0.0, float(meta["cross"])), {}, weights, (0.0, float(meta["self"])))
            self.blend = spec["lb"]

    def on(self, model, source):
        """The model with the case's edit."""
        if self.plan is None:
            return model
        edit = P2PEdit(source=source, plans=(self.plan,), mark="edit", layers=unet_layers(model), self_share=0.25, schedule=None)
        edits = [edit]
        if self.blend:
            words = [torch.zeros(77), torch.zeros(77)]
            for row, prompt, word in zip(words, (self.plan.source, self.plan.target), self.blend):
                row[list(prompt.positions(word))] = 1.0
            edits.append(LocalBlend(source=source, edit=edit, source_words=words[0], target_words=words[1][None], thresholds=(0.3, 0.3), start=0.0))
        return add_edits(model, *edits)

    def conds(self):
        positive = [[self.inputs["cond"][1:], {host.MARK: "edit"}]]
        return positive, [[self.inputs["uncond"], {}]], ((BRANCH, [[self.inputs["cond"][:1], {}]]),)


@torch.inference_mode()
@pytest.mark.parametrize("name", RUNS)
def test_eps_of_every_step_equals_the_published_run(oracles, model, name):
    import comfy.patcher_extension
    import comfy.samplers

    case = Case(oracles, name)
    positive, negative, branches = case.conds()
    latents = case.tensors["x"][:, :1] * case.scale[:, None, None, None, None]
    trajectory = Trajectory.for_model(model, case.sigmas.flip(0), latents.flip(0))
    edited, seen = case.on(model, Source(trajectory, branches)).clone(), []

    def note(executor, x, t, context, y, control, transformer_options, **kwargs):
        out = executor(x, t, context, y, control, transformer_options, **kwargs)
        rows = dict(zip(transformer_options["cond_or_uncond"], out))
        if len(rows) == 2:
            seen.append((rows[1], rows[0]))
        return out

    edited.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)

    def sample_euler(denoiser, x, levels, extra_args=None, callback=None, disable=None):
        for sigma, scale, given in zip(levels[:-1], case.scale, case.tensors["x"]):
            denoiser(given[1:] * scale, sigma * x.new_ones([1]), **extra_args)
        return x

    guider = comfy.samplers.CFGGuider(edited)
    guider.set_conds(positive, negative)
    guider.set_cfg(7.5)
    start = model.model.process_latent_out(latents[0])
    guider.sample(torch.zeros_like(start), start, comfy.samplers.KSAMPLER(sample_euler), case.sigmas, disable_pbar=True)
    assert len(seen) == 6
    for step, (uncond, target) in enumerate(seen):
        assert (uncond - case.tensors["eps"][step, 1]).abs().max() < 1e-5, f"unconditional row, step {step}"
        assert (target - case.tensors["eps"][step, 3]).abs().max() < 1e-5, f"edited row, step {step}"


@torch.inference_mode()
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_with_its_source_beside_it_equals_the_published_one(oracles, model, name):
    """From the shared noise on, source and edit, blend included; six steps of feedback through guidance 7.5 amplify the last bits."""
    import comfy.samplers

    case = Case(oracles, name)
    positive, negative, branches = case.conds()
    edited, path = case.on(model, CoevolvingSource(None, branches)), []
    watched = edited.clone()
    guider = comfy.samplers.CFGGuider(watched)
    guider.set_conds(positive, negative)
    guider.set_cfg(7.5)
    start = model.model.process_latent_out(case.inputs["latent"] * case.scale[0])
    euler = comfy.samplers.sampler_object("euler")
    out = guider.sample(torch.zeros_like(start), start, euler, case.sigmas, callback=lambda step, denoised, x, total: path.append(x.clone()), disable_pbar=True)
    path = [*path[: len(case.sigmas) - 1], model.model.process_latent_in(out)]
    for step, (x, scale) in enumerate(zip(path, case.scale)):
        theirs = case.tensors["x"][step, 1:]
        assert ((x / scale - theirs).norm() / theirs.norm()) < 1e-4, f"step {step}"
