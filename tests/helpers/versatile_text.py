"""Toys of Versatile Diffusion's text side: a text diffuser, an Optimus and its vocabularies, with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from ...versatile_diffusion import keys, text_unet_loader
from ...versatile_diffusion.dual import SETS, find
from ...versatile_diffusion.text_unet import text_config
from .models import randomise

LATENT, WIDTH, CONTEXT, MULTIPLIERS = 64, 32, 48, (1, 1, 2, 2)


def tiny_text(seed: int = 0, latent: int = LATENT, context: int = CONTEXT, sets: tuple[str, ...] = SETS, dtype=torch.float32):
    """A text diffuser of width 32 on the host's ModelPatcher."""
    model = text_unet_loader.build(text_config(latent, WIDTH, context, MULTIPLIERS), sets, 10**6, dtype)
    randomise(model.model.diffusion_model, seed)
    model.model.diffusion_model.requires_grad_(False)
    return model


def published(model, naming: str) -> dict[str, torch.Tensor]:
    """Weights of a `tiny_text` under the names of a published file; with "image_unet." and "text_unet." before them in the diffusers naming."""
    out = {}
    for key, tensor in model.model.diffusion_model.state_dict().items():
        name = find(key)
        if keys.group_of(name.key) != keys.CONTEXT:
            name = keys.Name(keys.TEXT, name.key)
        out[keys.write(name, naming)] = tensor.clone()
    return out


def diffusers_text_unet(model, part: str):
    """The text diffuser of diffusers with the weights of a `tiny_text` of both sets; part: whose attention it gets, "text" or "image"."""
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

    unet = UNetFlatConditionModel(
        in_channels=[LATENT, 1, 1], out_channels=[LATENT, 1, 1], block_out_channels=tuple(WIDTH * multiplier for multiplier in MULTIPLIERS),
        cross_attention_dim=CONTEXT, attention_head_dim=8,
    )
    state = published(model, keys.DIFFUSERS)
    own = {key.split(".", 1)[1]: value for key, value in state.items() if key.startswith("text_unet.")}
    if part == keys.IMAGE:
        own |= {key.split(".", 1)[1]: value for key, value in state.items() if key.startswith("image_unet.")}
    unet.load_state_dict(own, strict=True)
    return unet.eval().requires_grad_(False)


# Optimus: width 128 is two heads
LAYERS, VOCABULARY, POSITIONS, HIDDEN = 2, 60, 64, 160
BERT_LAYERS, BERT_VOCABULARY, BERT_POSITIONS, BERT_HIDDEN = 2, 40, 96, 192
TOKEN_WIDTH, TEXT_LATENT = 128, 96


def optimus_shapes(latent: int = TEXT_LATENT, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Every entry of a published file at toy size, by the reference sheet's Appendix A; the order of the table."""
    w = TOKEN_WIDTH
    norm = lambda prefix, width=w: {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}
    linear = lambda prefix, inputs, outputs: {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}
    conv1d = lambda prefix, inputs, outputs: {f"{prefix}.weight": (inputs, outputs), f"{prefix}.bias": (outputs,)}
    out = {
        "encoder.embeddings.word_embeddings.weight": (BERT_VOCABULARY, w), "encoder.embeddings.position_embeddings.weight": (BERT_POSITIONS, w),
        "encoder.embeddings.token_type_embeddings.weight": (2, w), **norm("encoder.embeddings.LayerNorm"),
    }
    for number in range(BERT_LAYERS):
        layer = f"encoder.encoder.layer.{number}"
        for part in ("query", "key", "value"):
            out |= linear(f"{layer}.attention.self.{part}", w, w)
        out |= linear(f"{layer}.attention.output.dense", w, w) | norm(f"{layer}.attention.output.LayerNorm")
        out |= linear(f"{layer}.intermediate.dense", w, BERT_HIDDEN) | linear(f"{layer}.output.dense", BERT_HIDDEN, w) | norm(f"{layer}.output.LayerNorm")
    out |= linear("encoder.pooler.dense", w, w) | {"encoder.linear.weight": (2 * latent, w)}
    out |= {"decoder.transformer.wte.weight": (vocabulary, w), "decoder.transformer.wpe.weight": (POSITIONS, w)}
    for number in range(LAYERS):
        layer = f"decoder.transformer.h.{number}"
        out |= norm(f"{layer}.ln_1") | {f"{layer}.attn.bias": (1, 1, POSITIONS, POSITIONS)} | conv1d(f"{layer}.attn.c_attn", w, 3 * w) | conv1d(f"{layer}.attn.c_proj", w, w)
        out |= norm(f"{layer}.ln_2") | conv1d(f"{layer}.mlp.c_fc", w, HIDDEN) | conv1d(f"{layer}.mlp.c_proj", HIDDEN, w)
    out |= norm("decoder.transformer.ln_f") | {"decoder.transformer.linear.weight": (LAYERS * w, latent), "decoder.transformer.linear_emb.weight": (w, latent)}
    return out | {"decoder.lm_head.weight": (vocabulary, w)}


def optimus_state(seed: int = 0, dtype: torch.dtype = torch.float32, latent: int = TEXT_LATENT, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """A published file at toy size: random weights, the causal masks, the tied copy of the token embedding."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in optimus_shapes(latent, vocabulary).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = 1 + 0.1 * noise if "LayerNorm.weight" in key or ".ln_" in key and key.endswith("weight") else 0.1 * noise
        else:
            value = noise / math.sqrt(TOKEN_WIDTH / 4)
        out[key] = value.to(dtype)
        if key.endswith(".attn.bias"):
            out[key] = torch.ones(shape, dtype=dtype).tril()
    out["decoder.lm_head.weight"] = out["decoder.transformer.wte.weight"]
    return out


BERT_WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrst", "##s", "##ing", ".", ",", "man", "walk", "dog", "red", "the", "is", "caf", "##e", "##\u00e9", "'",
]
GPT2_WORDS = [
    *"!'.,abcdefghijklmnopqrstuvwxyz-", "\u0120", "\u0120a", "\u0120man", "\u0120walks", "\u0120dog", "\u0120red", "\u0120the", "\u0120is", "\u0120n't", "\u0120.", "\u0120,",
]


def write_vocabularies(folder: Path) -> None:
    """Vocabularies of the toy Optimus in a folder, under the names of the authors' repository."""
    bert = BERT_WORDS + [f"word{number}" for number in range(BERT_VOCABULARY - len(BERT_WORDS))]
    gpt2 = GPT2_WORDS + [f"{chr(0x120)}x{number}" for number in range(VOCABULARY - 3 - len(GPT2_WORDS))]
    assert len(bert) == BERT_VOCABULARY and len(gpt2) == VOCABULARY - 3 and len(set(gpt2)) == len(gpt2)
    (folder / "bert-base-cased-vocab.txt").write_text("\n".join(bert) + "\n", encoding="utf-8")
    (folder / "gpt2-vocab.json").write_text(json.dumps({word: number for number, word in enumerate(gpt2)}), encoding="utf-8")


def own_models_folder(monkeypatch, folder: Path) -> Path:
    """Point the host at a models folder of the test's own and away from any Hugging Face cache; returns its sub-folder optimus."""
    import folder_paths
    import huggingface_hub

    from ...versatile_diffusion import files, optimus_files

    ours = (files.FOLDER, optimus_files.FOLDER)
    table = {key: value for key, value in folder_paths.folder_names_and_paths.items() if key not in ours}
    table |= {"vae": ([str(folder / "vae")], {".safetensors", ".pth"}), "diffusers": ([str(folder / "diffusers")], ["folder"])}
    for name in (*ours, "vae", "diffusers"):
        (folder / name).mkdir(exist_ok=True)
    monkeypatch.setattr(folder_paths, "models_dir", str(folder))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    return folder / optimus_files.FOLDER
