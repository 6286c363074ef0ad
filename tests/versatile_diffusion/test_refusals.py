"""Files that are something else, damaged or incomplete: one sentence each, before anything large is read."""

import math

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.tests.helpers.checkpoints import SD_VAE
from palimpsest.tests.helpers.versatile import common_names, tiny, write_files
from palimpsest.versatile_diffusion import loader
from palimpsest.versatile_diffusion.files import TensorFile
from palimpsest.versatile_diffusion.keys import DIFFUSERS, OFFICIAL_2022, OFFICIAL_2023, Name
from palimpsest.versatile_diffusion.sources import recognise


@pytest.fixture(scope="module")
def names():
    return common_names(tiny(seed=3))


def refusal(message, action):
    with pytest.raises(ValueError, match=message) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def write(path, *keys, shape=(2, 2)):
    save_file({key: torch.zeros(shape) for key in keys}, str(path))
    return str(path)


@pytest.mark.parametrize("key, what", [
    ("model.diffusion_model.input_blocks.0.0.weight", "an ordinary Stable Diffusion checkpoint"), ("input_blocks.0.0.weight", "an ordinary Stable Diffusion UNet"),
    ("down_blocks.0.resnets.0.norm1.weight", "may belong to any Stable Diffusion"), ("ctx.image.imencoder.norm0.weight", "a SeeCoder"),
    ("decoder.transformer.wte.weight", "Optimus"), ("encoder.conv_in.weight", "something else"), ("vision_model.post_layernorm.weight", "a CLIP vision model"),
    ("text_model.final_layer_norm.weight", "a CLIP text encoder"), ("lora_unet_x.lora_up.weight", "a LoRA"), ("encoder.down.0.block.0.norm1.weight", "a VAE"),
])
def test_other_files_are_named(tmp_path, key, what):
    refusal(rf"x\.safetensors is no Versatile Diffusion but .*{what}.*vd-four-flow", lambda: recognise(write(tmp_path / "x.safetensors", key)))


def test_the_text_diffuser_is_not_taken_for_the_image_one(tmp_path, names):
    folder = write_files(tmp_path, DIFFUSERS, names)
    refusal("is the text diffuser.*Versatile Text Model Loader", lambda: recognise(str(folder / "text_unet" / "diffusion_pytorch_model.safetensors")))
    text = {name: value for name, value in names.items() if name.part == "text"}
    refusal("holds no image diffuser", lambda: recognise(str(write_files(tmp_path / "b", OFFICIAL_2023, {**text, Name("text", "out.2.weight"): torch.zeros(2, 2)}))))
    (tmp_path / "empty" / "image_unet").mkdir(parents=True)
    refusal("The folder empty holds no image diffuser", lambda: recognise(str(tmp_path / "empty")))


@pytest.mark.parametrize("naming, suffix", [(OFFICIAL_2023, ".safetensors"), (OFFICIAL_2022, ".pth")])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.7])
def test_files_that_are_cut_off(tmp_path, names, naming, suffix, share):
    path = write_files(tmp_path, naming, names, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal("cannot be read.*fetch it again", lambda: recognise(str(path)))


def test_program_objects_are_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (print, ("pwned",))

    torch.save({"model": Bad()}, tmp_path / "x.pth")
    refusal("cannot be read", lambda: recognise(str(tmp_path / "x.pth")))


def test_a_missing_and_a_misshapen_tensor_are_named_before_anything_is_read(tmp_path, monkeypatch, names):
    lacking = {name: value for name, value in names.items() if name != Name("text", "middle_block.1.proj_in.bias")}
    refusal("lacks 1 tensor, middle_block.1.proj_in.bias", lambda: loader.load_model(recognise(str(write_files(tmp_path, OFFICIAL_2023, lacking)))))
    wrong = {**names, Name("image", "out.2.weight"): torch.zeros(4, 16, 3, 3)}
    refusal("another shape.*out.2.weight", lambda: loader.load_model(recognise(str(write_files(tmp_path, OFFICIAL_2023, wrong)))))
    stem = {name: value for name, value in names.items() if name != Name("image", "input_blocks.4.0.out_layers.3.bias")}
    refusal("tell its size, input_blocks.4.0", lambda: loader.load_model(recognise(str(write_files(tmp_path, OFFICIAL_2023, stem)))))


class Listed:
    """A file that knows names and shapes, and whose tensors are zeros. read: keys of those that were asked for."""

    name = "x.safetensors"

    def __init__(self, shapes):
        self.shapes, self.read = shapes, []

    def part(self, prefix, starts=("",)):
        self.read = [key for key in self.shapes if key.startswith(tuple(prefix + start for start in starts))]
        return {key.removeprefix(prefix): torch.zeros(self.shapes[key], dtype=torch.float16) for key in self.read}


def clip_shapes():
    import comfy.sd1_clip

    with torch.device("meta"):
        encoder = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float16)
    return {key: tuple(value.shape) for key, value in encoder.transformer.state_dict().items()}


def vision_shapes(**changes):
    import comfy.clip_model
    import comfy.ops

    from palimpsest.tests.helpers.versatile import TOWER

    config = {**TOWER, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768, **changes}
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in comfy.clip_model.CLIPVisionModelProjection(config, torch.float16, "meta", comfy.ops.manual_cast).state_dict().items()}


@torch.inference_mode()
def test_the_text_encoder_needs_its_projection_and_all_of_its_tensors():
    shapes = clip_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == 123_650_304
    prefixed = {f"ctx.text.model.{key}": shape for key, shape in shapes.items()}
    clip = loader.load_clip(Listed(prefixed), "ctx.text.model.")
    assert clip.cond_stage_model.clip_l.transformer.text_projection.weight.shape == (768, 768)
    assert "TextContextEncoder" in type(clip.cond_stage_model.clip_l).__name__
    refusal("has no text_projection.weight", lambda: loader.load_clip(Listed({key: shape for key, shape in shapes.items() if "projection" not in key})))
    refusal("lacks 16 tensors of its CLIP", lambda: loader.load_clip(Listed({key: shape for key, shape in shapes.items() if ".layers.7." not in key})))
    refusal("holds no CLIP text encoder", lambda: loader.load_clip(Listed({"x": (1,)})))
    refusal("is 1024 values wide", lambda: loader.load_clip(Listed({**shapes, "text_model.embeddings.token_embedding.weight": (49408, 1024)})))


def test_other_vision_towers_are_refused():
    shapes = vision_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == 303_966_208
    refusal("holds no visual_projection.weight", lambda: loader.load_clip_vision(Listed({key: shape for key, shape in shapes.items() if "visual_projection" not in key})))
    refusal("577 tokens", lambda: loader.load_clip_vision(Listed(vision_shapes(image_size=336))))
    refusal("projected to 1024", lambda: loader.load_clip_vision(Listed(vision_shapes(hidden_size=1280, projection_dim=1024))))
    refusal("holds no CLIP vision model", lambda: loader.load_clip_vision(Listed({"x": (1,)})))


@torch.inference_mode()
def test_only_the_tower_that_is_asked_for_is_read(monkeypatch):
    """Regression: of a file with both towers, 1.7 GB, all of it was read and copied for each."""
    text, vision = clip_shapes(), vision_shapes()
    both = Listed(text | vision | {"logit_scale": ()})
    loader.load_clip(both)
    assert set(both.read) == set(text) - {"logit_scale"}
    monkeypatch.setattr("comfy.clip_vision.load_clipvision_from_sd", lambda state: None)
    refusal("lacks layers", lambda: loader.load_clip_vision(both))
    assert set(both.read) == set(vision)


def vae_shapes(channels=4):
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in AutoencoderKL(ddconfig={**SD_VAE, "z_channels": channels}, embed_dim=channels).state_dict().items()}


def diffusers_vae_shapes():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@pytest.fixture
def taken(monkeypatch):
    """State dicts that reached the host's VAE, which does nothing."""
    out = []
    monkeypatch.setattr("comfy.sd.VAE", lambda sd: out.append(sd))
    return out


@pytest.mark.parametrize("part", ["decoder.mid", "quant_conv.bias", "encoder.conv_out"])
@pytest.mark.parametrize("shapes_of", [vae_shapes, diffusers_vae_shapes])
def test_a_vae_that_lacks_tensors_is_refused(taken, shapes_of, part):
    """Regression: the host only logs what is missing, and such a VAE ran on uninitialised memory."""
    shapes = shapes_of()
    assert len(shapes) == 248
    file = Listed({f"vae.image.{key}": shape for key, shape in shapes.items() if not key.startswith(part)})
    refusal(f"The VAE in x.safetensors lacks {len(shapes) - len(file.shapes)} tensors?, {part}", lambda: loader.load_vae(file, "vae.image."))
    assert not file.read and not taken


@pytest.mark.parametrize("shapes_of", [vae_shapes, diffusers_vae_shapes])
def test_the_vae_of_sd_1_is_taken_and_no_other_shapes(taken, shapes_of):
    shapes = shapes_of()
    refusal("in another shape.*decoder.conv_out.weight", lambda: loader.load_vae(Listed({**shapes, "decoder.conv_out.weight": (6, 128, 3, 3)})))
    assert not taken
    loader.load_vae(Listed({**shapes, "loss.logvar": (), "model_ema.decay": ()}))
    assert set(taken[0]) == set(shapes), "what else is in the file is not read"


def test_a_vae_of_another_number_of_channels_is_refused(taken):
    """Regression: that of Flux or SD 3, which has 16, failed only when a picture was decoded."""
    shapes = {key: shape for key, shape in vae_shapes(16).items() if "quant_conv" not in key}
    refusal("has 16 latent channels, but Versatile Diffusion's has 4", lambda: loader.load_vae(Listed(shapes)))
    assert not taken


def test_a_file_without_vae_is_refused(tmp_path):
    refusal("holds no VAE", lambda: loader.load_vae(TensorFile(write(tmp_path / "x.safetensors", "x"))))


@pytest.mark.slow
@torch.inference_mode()
def test_towers_and_vae_of_the_right_size_are_taken():
    """600 MB and 330 MB of zeros."""
    from palimpsest.versatile_diffusion.contexts import check_tower

    tower = loader.load_clip_vision(Listed({f"ctx.image.model.{key}": shape for key, shape in vision_shapes().items()}), "ctx.image.model.")
    check_tower(tower)
    del tower
    refusal("lacks 16 tensors of its CLIP", lambda: loader.load_clip_vision(Listed({key: shape for key, shape in vision_shapes().items() if ".layers.7." not in key})))
    shapes = vae_shapes()
    assert len(shapes) == 248 and sum(math.prod(shape) for shape in shapes.values()) == 83_653_863
    vae = loader.load_vae(Listed({f"vae.image.{key}": shape for key, shape in shapes.items()}), "vae.image.")
    assert vae.latent_channels == 4
