"""The pack's other nodes on Versatile Diffusion's models: an edit of one flow is that of the plain model it is, everything else is refused by name."""

import re
from types import SimpleNamespace

import pytest
import torch

from palimpsest.attention_patches.mrsa import compose
from palimpsest.attention_patches.pnp import apply_pnp
from palimpsest.inversion.null_text import Settings as NullTextSettings
from palimpsest.inversion.null_text_run import run_null_text
from palimpsest.inversion.run import run_inversion
from palimpsest.inversion.trajectory import clean_latent, start_latent
from palimpsest.nodes.attention_maps import CollectAttentionMaps, CollectFeatures
from palimpsest.nodes.ddim_invert import DDIMInvert
from palimpsest.nodes.instruct_pix2pix import InstructPix2PixCFG
from palimpsest.nodes.mrsa import MRSAConceptComposer
from palimpsest.nodes.p2p import P2PController
from palimpsest.nodes.pnp import PnPInjector
from palimpsest.nodes.seecoder import SeeCoderEncode
from palimpsest.nodes.visii import VisiiLearnInstruction
from palimpsest.p2p.apply import Settings, apply_p2p
from palimpsest.seecoder.encode import check_model
from palimpsest.tests.helpers.concepts import concept, concepts
from palimpsest.tests.helpers.inversions import smooth
from palimpsest.tests.helpers.models import tiny_sd15, tiny_trajectory
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.sampling import ksampler, latent_noise
from palimpsest.tests.helpers.versatile import context, dual, picture, relative, text_clip, tiny
from palimpsest.tests.helpers.versatile_text import tiny_text
from palimpsest.versatile_diffusion.contexts import image_conditioning

EMPTY = torch.zeros(1, 4, 16, 16)
PARTS = ("text", "image")
KINDS = ("both", "text", "image", "text diffuser of both", "text diffuser of texts", "text diffuser of pictures")


@pytest.fixture(scope="module")
def models():
    made = [tiny(), tiny(sets=("text",), seed=1), tiny(sets=("image",), seed=2), *(tiny_text(context=64, sets=sets) for sets in (PARTS, ("text",), ("image",)))]
    return dict(zip(KINDS, made))


@pytest.fixture(scope="module")
def plain(models):
    """The host's own SD 1.x model with the weights of each single flow."""
    out = {}
    for part in PARTS:
        out[part] = tiny_sd15(context_dim=64, channel_mult=(1, 1, 1, 1))
        out[part].model.diffusion_model.load_state_dict(models[part].model.diffusion_model.state_dict())
    return out


def cond(part, seed):
    return [[context(77, seed), {}]] if part == "text" else image_conditioning([context(257, seed)])


def same_as_plain(models, plain, part, edit):
    """The run of an edited flow is the edited plain model's bit for bit, and not that of the flow without the edit."""
    outs = []
    for model in (models[part], plain[part]):
        edited, prompt = edit(model)
        outs.append(ksampler(edited, EMPTY, prompt, cond(part, 2)))
    assert torch.isfinite(outs[0]).all() and torch.equal(*outs)
    assert relative(outs[0], ksampler(models[part], EMPTY, prompt, cond(part, 2))) > 1e-3


@pytest.mark.parametrize("part", PARTS)
def test_plug_and_play_on_one_flow(models, plain, part):
    same_as_plain(models, plain, part, lambda model: (apply_pnp(model, tiny_trajectory(model, cond=cond(part, 7)))[0], cond(part, 1)))


@pytest.mark.parametrize("fidelity", [1.0, 0.5])
@pytest.mark.parametrize("part", PARTS)
def test_mrsa_on_one_flow(models, plain, part, fidelity):
    shown = concepts(*(concept(seed, cond=cond(part, 20 + seed)) for seed in (1, 2)))
    same_as_plain(models, plain, part, lambda model: (compose(model, shown, fidelity=fidelity, seed=3)[0], cond(part, 1)))


@pytest.mark.parametrize("inverted", [False, True])
def test_prompt_to_prompt_on_the_text_flow(models, plain, inverted):
    clip = text_clip()

    @torch.inference_mode()
    def edit(model):
        path = tiny_trajectory(model, cond=cond("text", 7)) if inverted else None
        found = apply_p2p(model, clip, "a red circle", "a blue circle", Settings(), trajectory=path)
        return found.model, found.positive

    same_as_plain(models, plain, "text", edit)


@torch.inference_mode()
def run(node, **changed):
    """A node's outputs with its widgets at their defaults."""
    defaults = {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}
    return node.execute(**{**defaults, **changed}).args


@pytest.mark.parametrize("part", PARTS)
def test_inversion_of_one_flow_is_the_plain_models(models, plain, part):
    paths = [
        run(DDIMInvert, model=model, latent_image={"samples": latent_noise(1, 4, 16, 16)}, positive=cond(part, 1), steps=3)[1] for model in (models[part], plain[part])
    ]
    assert torch.equal(paths[0].latents, paths[1].latents) and relative(paths[0].latents[-1], paths[0].latents[0]) > 1e-3


def test_inversion_of_a_blend_runs_through_the_node():
    path = run(DDIMInvert, model=smooth(tiny()), latent_image={"samples": latent_noise(1, 4, 16, 16)}, positive=dual(0.5), steps=3)[1]
    assert path.steps == 3 and path.conditioning[0][1]["versatile_ratio"] == 0.5


QUICK = NullTextSettings(inner_steps=3, early_stop=0.0, checkpointing="off")


@pytest.mark.parametrize("negative", [image_conditioning([torch.zeros(1, 257, 64)]), dual(0.5, seed=5)], ids=["of a picture", "of a blend"])
def test_null_text_trains_the_negative_of_its_flow(negative):
    """Its prompts keep the flow of the one they start from, and bring the sampler back to the picture more closely."""
    model = smooth(tiny())
    positive = dual(0.5) if negative[0][1]["versatile_flow"] == "dual" else image_conditioning([context(257, 1)])
    with torch.inference_mode():
        path = run_inversion(model, {"samples": latent_noise(1, 4, 16, 16) * 4}, positive, steps=3, iterations=3).trajectory
        found = run_null_text(model, path, negative, settings=QUICK)
    assert len(found.conditioning) == 3 and all(options["versatile_flow"] == negative[0][1]["versatile_flow"] for _, options in found.conditioning)
    assert sum(float(step.loss) for step in found.steps) < sum(float(step.loss) for step in found.before)
    start, clean = start_latent(path, model)["samples"], clean_latent(path, model)["samples"]
    how = {"steps": 3, "cfg": QUICK.guidance, "scheduler": "ddim_uniform", "disable_noise": True}
    before, after = (relative(ksampler(model, start, positive, words, **how), clean) for words in (negative, found.conditioning))
    assert after < before


def test_null_text_refuses_words_that_are_not_read():
    model = smooth(tiny())
    path = tiny_trajectory(model, cond=dual(0.0))
    with pytest.raises(ValueError, match="at ratio 0, where its words have no effect: connect the negative of the picture alone"):
        run_null_text(model, path, dual(0.0, seed=5), settings=QUICK)


def test_features_of_one_flow_can_be_looked_at(models):
    watched, features = run(CollectFeatures, model=models["image"])
    out = ksampler(watched, EMPTY, cond("image", 1), cond("image", 2))
    assert torch.equal(out, ksampler(models["image"], EMPTY, cond("image", 1), cond("image", 2))) and features.read()


WORDS = {"clip": WordClip(64), "source_prompt": "a cat", "edit_prompt": "a dog"}
BLEND, PICTURES, TEXTS = "edits of attention know one: set flows to text or image", "reads pictures alone.*set flows to text in Versatile Diffusion Loader", "is the text diffuser"
NO_EDITOR = "takes 4, as an ordinary text-to-image model: load an instruct-pix2pix checkpoint"
NOT_SEECODER = "a Versatile Diffusion, which reads pictures through its own encoder.*use Versatile Image Context"


def needs(node, models, kind):
    """The other inputs of a node."""
    own = models["both"] if "diffuser" in kind else models[kind]
    return {
        P2PController: WORDS, MRSAConceptComposer: {"concepts": concepts(concept(1, cond=cond("text", 1)))},
        PnPInjector: {"trajectory": tiny_trajectory(own, cond=cond("text", 1))},
        DDIMInvert: {"latent_image": {"samples": latent_noise(1, 64, 1, 1)}, "positive": cond("text", 1)}, InstructPix2PixCFG: {},
        CollectAttentionMaps: {"clip": WordClip(64), "prompt": "a cat", "words": ""}, CollectFeatures: {},
        SeeCoderEncode: {"seecoder": SimpleNamespace(width=64, name="x"), "image": picture(32, 32)},
        VisiiLearnInstruction: {"clip": None, "vae": None, "before": picture(32, 32), "after": picture(32, 32, seed=1)},
    }[node]


TEXT_DIFFUSERS = KINDS[3:]
REFUSED = [
    *((node, "both", BLEND) for node in (P2PController, MRSAConceptComposer, PnPInjector, CollectAttentionMaps, CollectFeatures)),
    *((node, "image", PICTURES) for node in (P2PController, CollectAttentionMaps)),
    *((node, kind, TEXTS) for node in (P2PController, MRSAConceptComposer, PnPInjector, DDIMInvert, CollectAttentionMaps, CollectFeatures) for kind in TEXT_DIFFUSERS),
    *((node, kind, NO_EDITOR) for node in (InstructPix2PixCFG, VisiiLearnInstruction) for kind in KINDS[:3]),
    *((node, kind, "needs an edit model.*is TextDiffuser: load an instruct") for node in (InstructPix2PixCFG, VisiiLearnInstruction) for kind in TEXT_DIFFUSERS),
    *((SeeCoderEncode, kind, NOT_SEECODER) for kind in KINDS),
]


@pytest.mark.parametrize("node, kind, message", REFUSED, ids=[f"{node.__name__} {kind}" for node, kind, _ in REFUSED])
def test_what_cannot_be_edited_is_refused_when_the_node_runs(models, node, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        run(node, model=models[kind], **needs(node, models, kind))
    said = str(error.value)
    assert "\n" not in said and said.endswith(".") and ". " not in said.replace("SD1.x", "") and re.search(r": (connect|load|set|use) ", said)


def test_a_diffuser_of_prompt_free_diffusion_reads_seecoder(models):
    """Text attention alone under the names of 2023; told by the loader, see test_loader.py."""
    sister = tiny(sets=("text",))
    sister.model.prompt_free = True
    check_model(sister, SimpleNamespace(width=64, name="x"))
    with pytest.raises(ValueError, match="wants 64 values per token"):
        check_model(sister, SimpleNamespace(width=768, name="x"))
