"""Optimus on the wire: loading, refusals, memory, texts to latents and back, cancel, editing."""

import gc
import json

import comfy.model_management as mm
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

from palimpsest.tests.helpers import versatile_text as toy
from palimpsest.tests.helpers.versatile import relative
from palimpsest.versatile_diffusion import files, optimus, optimus_files
from palimpsest.versatile_diffusion.files import TensorFile


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/optimus with the toy vocabularies."""
    own = toy.own_models_folder(monkeypatch, tmp_path)
    toy.write_vocabularies(own)
    return own


@pytest.fixture
def model(folder):
    return built(folder / "optimus-vae.pth")


def built(path, state=None, precision="auto"):
    """The Optimus of a file with this state dict, the toy's without one."""
    return optimus.from_file(TensorFile(save(path, toy.optimus_state() if state is None else state)), precision)


def latents(count=2, seed=0):
    return torch.randn(count, toy.TEXT_LATENT, 1, 1, generator=torch.Generator().manual_seed(seed))


def refusal(path, message, state, precision="auto"):
    with pytest.raises(ValueError, match=message) as error:
        built(path, state, precision)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def save(path, state):
    if path.suffix == ".safetensors":
        save_file({key: value.clone().contiguous() for key, value in state.items()}, str(path))
    else:
        torch.save(state, path)
    return str(path)


def weights(model):
    return dict(model.network.named_parameters())


@torch.inference_mode()
@pytest.mark.parametrize("name, change", [
    ("a.pth", lambda state: state), ("b.safetensors", lambda state: state), ("c.pth", lambda state: {"state_dict": state}),
    ("d.safetensors", lambda state: {**{f"vae.text.{key}": value for key, value in state.items()}, "vae.image.decoder.conv_in.weight": torch.ones(2), "betas": torch.ones(3)}),
    ("e.pth", lambda state: {key: value for key, value in state.items() if not key.endswith((".attn.bias", "lm_head.weight"))}),
    ("f.pth", lambda state: {**state, "encoder.embeddings.position_ids": torch.arange(toy.BERT_POSITIONS)[None]}),
])
def test_every_form_of_the_file_gives_the_same_network(folder, name, change):
    expected = built(folder / "x.pth")
    loaded = optimus.load(save(folder / name, change(toy.optimus_state())))
    ours, theirs = weights(loaded), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "encoder and decoder" in loaded.describe() and name in loaded.describe()


def test_no_tensor_is_held_twice(folder):
    """Neither the mask buffers nor the second token embedding stay."""
    held = sum(value.numel() for key, value in toy.optimus_state().items() if not key.endswith((".attn.bias", "lm_head.weight")))
    model = built(folder / "x.pth")
    assert sum(parameter.numel() for parameter in weights(model).values()) == held
    assert model.patcher.model_size() == sum(value.numel() * value.element_size() for value in model.network.state_dict().values())


def test_a_file_is_loaded_once_and_let_go(folder):
    path = save(folder / "a.safetensors", toy.optimus_state())
    first = optimus.load(path)
    assert optimus.load(path) is first and optimus.load(path, "fp32") is not first
    key = next(key for key, value in optimus._loaded.items() if value is first)
    before = {name: value.clone() for name, value in weights(first).items()}
    other = save(folder / "b.safetensors", toy.optimus_state(seed=5))
    with open(path, "r+b") as file, open(other, "rb") as content:
        file.write(content.read())
    assert all(torch.equal(value, before[name]) for name, value in weights(first).items()), "not mapped to the file"
    del first
    gc.collect()
    assert key not in optimus._loaded


def whole_file(path):
    """A four-flow file in small, with Optimus in it."""
    optimus_part = {f"vae.text.{key}": value for key, value in toy.optimus_state().items()}
    return save(path, {"diffuser.image.data_blocks.0.0.weight": torch.ones(2, 2), **optimus_part, "vae.image.decoder.conv_in.weight": torch.ones(2)})


@pytest.mark.parametrize("name", ["vd.pth", "vd.safetensors"])
def test_a_whole_file_is_read_for_optimus_alone_with_progress(folder, monkeypatch, name):
    """Regression: a four-flow file of 5 or 10 GB was read into memory as a whole, without progress."""
    path = whole_file(folder / name)
    read, steps, plain = [], [], TensorFile.read
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *args, **kwargs: pytest.fail("read as a whole"))
    monkeypatch.setattr(TensorFile, "read", lambda self, wanted: (read.extend(wanted), plain(self, wanted))[1])
    monkeypatch.setattr(comfy.utils.ProgressBar, "update", lambda self, value: steps.append(value))
    model = optimus.load(path)
    assert len(read) == len(set(read)) == len(steps) == len(model.network.state_dict())
    assert all(key.startswith("vae.text.") and not key.endswith((".attn.bias", "lm_head.weight")) for key in read)


def test_cancel_while_loading_and_the_next_run(folder, monkeypatch):
    """Regression: loading Optimus did not look whether it was cancelled."""
    path, calls = whole_file(folder / "vd.pth"), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise mm.InterruptProcessingException()

    with monkeypatch.context() as patched:
        patched.setattr(mm, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(mm.InterruptProcessingException):
            optimus.load(path)
    assert len(calls) == 3 and len(optimus.load(path).decode(latents())) == 2


@torch.inference_mode()
def test_number_formats(folder):
    exact = built(folder / "a.pth")
    expected = exact.encode(["the man walks"])
    stored = built(folder / "b.pth", toy.optimus_state(dtype=torch.float16))
    assert stored.compute == torch.float32 and 0 < relative(stored.encode(["the man walks"]), expected) < 1e-2
    half = built(folder / "c.pth", precision="fp16")
    out = half.encode(["the man walks"])
    assert half.compute == torch.float16 and out.dtype == torch.float32 and 0 < relative(out, expected) < 2e-2
    assert "fp16" in half.describe() and all(value.dtype == torch.float16 for value in weights(half).values())
    assert len(half.decode(latents())) == 2


def test_other_files_are_named(tmp_path):
    path = tmp_path / "x.pth"
    refusal(path, "holds no Optimus .an image VAE.", {"decoder.conv_in.weight": torch.ones(2), "encoder.conv_in.weight": torch.ones(2)})
    refusal(path, "holds no Optimus .its first tensor is called something.", {"something": torch.ones(2)})
    refusal(path, "holds no Optimus .no tensor.", {})
    refusal(path, "holds no Optimus .no tensor.", [1, 2])
    state = toy.optimus_state()
    lost = "decoder.transformer.h.1.attn.c_attn.bias"
    refusal(path, f"lacks 1 tensor, {lost} first", {key: value for key, value in state.items() if key != lost})
    refusal(path, "has besides what belongs to it 1 tensor, decoder.transformer.extra.weight", {**state, "decoder.transformer.extra.weight": torch.ones(1)})
    refusal(path, "another shape .* 1 tensor, decoder.linear.weight", {**state, "decoder.transformer.linear.weight": torch.ones(5, toy.TEXT_LATENT)})
    refusal(path, "lacks tensors of Optimus .decoder.linear_emb.weight first", {key: value for key, value in state.items() if "linear_emb" not in key})
    refusal(path, "beyond the range of fp16: set precision to fp32", {**state, "decoder.transformer.ln_f.bias": torch.full((toy.TOKEN_WIDTH,), 1e6)}, "fp16")


def test_damaged_files_are_refused_in_one_sentence(folder):
    whole = open(save(folder / "whole.safetensors", toy.optimus_state()), "rb").read()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pth").write_bytes(b"")
    for name in ("cut.safetensors", "empty.pth"):
        with pytest.raises(ValueError, match="cannot be read") as error:
            optimus.load(str(folder / name))
        assert "\n" not in str(error.value)


def test_a_pickle_with_code_is_refused(folder):
    class Code:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"decoder.transformer.wte.weight": Code()}, folder / "code.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        optimus.load(str(folder / "code.pth"))


@torch.inference_mode()
def test_texts_to_latents(model):
    out = model.encode(["The red dog", "the man is walking , the dogs", ""])
    assert out.shape == (3, toy.TEXT_LATENT, 1, 1) and out.dtype == torch.float32
    assert relative(out[:1], model.encode(["the RED dog"])) < 1e-5, "lower-cased, and padding is not read"
    assert relative(out[1:2], model.encode(["the man is walking , the dogs"])) < 1e-5
    assert relative(out[:1], out[1:2]) > 0.01


@torch.inference_mode()
def test_many_texts_are_encoded_in_parts_that_can_be_cancelled(model, monkeypatch):
    texts = [f"the man {'walk ' * (number % 7)}" for number in range(70)]
    out = model.encode(texts)
    assert out.shape == (70, toy.TEXT_LATENT, 1, 1)
    for number in (0, 31, 32, 69):
        assert relative(out[number:number + 1], model.encode([texts[number]])) < 1e-5
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 2:
            raise mm.InterruptProcessingException()

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        model.encode(texts)


@torch.inference_mode()
def test_latents_to_texts(model):
    texts = model.decode(latents(3), seed=5, repeats="keep")
    assert len(texts) == 3 and len(set(texts)) == 3 and all(isinstance(text, str) for text in texts)
    assert texts == model.decode(latents(3)[:, :, 0, 0], seed=5, repeats="keep") != model.decode(latents(3), seed=6, repeats="keep")
    assert model.decode(latents(3), temperature=0.0, seed=1) == model.decode(latents(3), temperature=0.0, seed=2)
    assert all(len(text.split()) <= 3 for text in model.decode(latents(3), length=5, repeats="keep"))
    long = model.decode(latents(1), length=40, temperature=0.0, repeats="keep")[0]
    tidied = model.decode(latents(1), length=40, temperature=0.0)[0]
    assert len(tidied) <= len(long)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4, 8, 8), torch.zeros(1, 768, 1, 1), torch.zeros(toy.TEXT_LATENT)])
def test_other_latents_are_refused(model, wrong):
    with pytest.raises(ValueError, match="reads latents of texts") as error:
        model.decode(wrong)
    assert "\n" not in str(error.value)


def test_latents_that_are_not_finite_are_refused(model):
    with pytest.raises(ValueError, match="not finite"):
        model.decode(torch.full((1, toy.TEXT_LATENT, 1, 1), float("nan")))


def test_a_decoder_alone_writes_and_says_what_it_cannot(folder):
    alone = built(folder / "decoder.pth", {key: value for key, value in toy.optimus_state().items() if key.startswith("decoder.")})
    assert "decoder only" in alone.describe() and len(alone.decode(latents())) == 2
    with pytest.raises(ValueError, match="holds Optimus' decoder only"):
        alone.encode(["a"])


def test_cancel_while_writing_and_the_next_run(model, monkeypatch):
    before = model.decode(latents(), seed=3)
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 4:
            raise mm.InterruptProcessingException()

    with monkeypatch.context() as patched:
        patched.setattr(mm, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(mm.InterruptProcessingException):
            model.decode(latents(), seed=3, length=30)
    assert len(calls) == 4
    assert model.decode(latents(), seed=3) == before


def test_the_host_loads_the_network_and_may_unload_it(model):
    mm.unload_all_models()
    before = model.decode(latents(), seed=3)
    assert any(loaded.model is model.patcher for loaded in mm.current_loaded_models)
    mm.unload_all_models()
    assert not any(loaded.model is model.patcher for loaded in mm.current_loaded_models)
    assert model.decode(latents(), seed=3) == before


def test_editing_takes_a_phrase_out_and_puts_one_in(model):
    start = latents(3)
    with torch.inference_mode():
        minus, plus = model.encode(["red"]), model.encode(["dog"])
        out = model.edit(start, " red ", "dog")
        assert torch.equal(model.edit(start, "", "  "), start)
    flat = lambda x: x[:, :, 0, 0].double()
    unit = flat(minus) / flat(minus).norm()
    expected = flat(start) - (flat(start) @ unit.T) * unit + flat(plus)
    assert out.shape == start.shape and relative(out[:, :, 0, 0], expected) < 1e-6
    assert float((flat(optimus.edited(start, minus)) @ unit.T).abs().max()) < 1e-5, "nothing of the phrase is left"


# where files lie
def test_vocabularies_are_found_and_missing_ones_are_asked_for(folder, tmp_path, monkeypatch):
    path = str(folder / "optimus-vae.pth")
    assert optimus_files.gpt2_vocabulary(path).endswith("gpt2-vocab.json")
    (folder / "gpt2-vocab.json").rename(folder / "x.json")
    (folder / "bert-base-cased-vocab.txt").unlink()
    model = built(folder / "optimus-vae.pth")
    with pytest.raises(ValueError, match="Writing text needs GPT-2's vocabulary") as error:
        model.decode(latents())
    assert "as models/optimus/gpt2-vocab.json" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Encoding text needs BERT's vocabulary.* as models/optimus/bert-base-cased-vocab.txt"):
        model.encode(["a"])
    (folder / "gpt2").mkdir()
    (folder / "x.json").rename(folder / "gpt2" / "vocab.json")
    assert len(model.decode(latents())) == 2, "looked for anew"
    # beside a model that lies elsewhere
    (tmp_path / "elsewhere").mkdir()
    (folder / "gpt2" / "vocab.json").rename(tmp_path / "elsewhere" / "vocab.json")
    assert optimus_files.gpt2_vocabulary(str(tmp_path / "elsewhere" / "m.pth")) == str(tmp_path / "elsewhere" / "vocab.json")
    asked = []

    def cached(repository, name):
        asked.append((repository, name))
        return str(tmp_path / "cached.json") if repository == "gpt2" else object()

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert optimus_files.gpt2_vocabulary(path) == str(tmp_path / "cached.json") and asked[0] == ("openai-community/gpt2", "vocab.json")


def test_sentences_page_and_graphs_name_the_same_place_first(root):
    """Regression: errors and the help page named folders with vocab.json and vocab.txt first, README and graphs gpt2-vocab.json and bert-base-cased-vocab.txt."""
    page = (root / "web" / "docs" / "PalimpsestVersatileOptimusLoader.md").read_text(encoding="utf-8")
    note = (root / "workflows" / "api" / "versatile_image_to_text-vd.md").read_text(encoding="utf-8")
    for sentence, (first, second, *_) in ((optimus_files.GPT2_WHERE, optimus_files.GPT2_NAMES), (optimus_files.BERT_WHERE, optimus_files.BERT_NAMES)):
        assert f"models/optimus/{first}" in sentence and second not in sentence
        assert 0 < page.index(f"`models/optimus/{first}`") < page.index(f"`models/optimus/{second}`") and f"`{first}`" in note


def test_the_list_is_that_of_models_optimus_and_vae(folder, tmp_path, root):
    """Regression: the help page promised whole four-flow files without saying that they have to lie in models/optimus."""
    whole_file(folder / "here.pth")
    whole_file(tmp_path / files.FOLDER / "there-optimus.pth")
    assert optimus_files.choices() == ["here.pth"]
    page = (root / "web" / "docs" / "PalimpsestVersatileOptimusLoader.md").read_text(encoding="utf-8")
    assert "`models/versatile_diffusion` is not searched" in page


def test_a_vocabulary_of_another_model_is_refused(model, folder):
    (folder / "gpt2-vocab.json").write_text(json.dumps({"a": 0, "b": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="has 2 tokens, but the loaded Optimus needs one of 57"):
        model.decode(latents())


def test_choices_and_find(folder, tmp_path):
    assert optimus_files.choices() == [optimus_files.NONE_FOUND], "vocabularies are no models"
    with pytest.raises(ValueError, match="There is no Optimus file yet: put optimus-vae.pth"):
        optimus_files.find(optimus_files.NONE_FOUND)
    save(folder / "optimus-vae.pth", {"a": torch.ones(1)})
    save(tmp_path / "vae" / "my-optimus.safetensors", {"a": torch.ones(1)})
    save(tmp_path / "vae" / "kl-f8.pth", {"a": torch.ones(1)})
    import folder_paths

    folder_paths.filename_list_cache.clear()
    assert optimus_files.choices() == ["my-optimus.safetensors", "optimus-vae.pth"]
    assert optimus_files.find("optimus-vae.pth") == str(folder / "optimus-vae.pth")
    with pytest.raises(ValueError, match="There is no file gone.pth"):
        optimus_files.find("gone.pth")
