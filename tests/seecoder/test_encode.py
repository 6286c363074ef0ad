"""From pictures to conditioning: sizes, masks, batches, weights, text, negatives; and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.seecoder import encode, loader
from palimpsest.tests.helpers.models import tiny_cond, tiny_sd15, tiny_sdxl
from palimpsest.tests.helpers.seecoder import random_picture, random_state, relative, small


@pytest.fixture(scope="module")
def model():
    return loader.from_state(random_state(small()), "small.safetensors")


def refused(message, function, *args):
    with pytest.raises(ValueError, match=message) as error:
        function(*args)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_resizing_keeps_the_aspect_and_zero_keeps_the_picture():
    picture = random_picture(60, 90)
    assert encode.resized(picture, 0) is picture and encode.resized(picture, 90) is picture
    assert encode.resized(picture, 45).shape == (1, 30, 45, 3)
    larger = encode.resized(picture, 180)
    assert larger.shape == (1, 120, 180, 3) and 0 <= larger.min() and larger.max() <= 1
    assert encode.resized(random_picture(1, 1000), 100).shape == (1, 1, 100, 3)


@torch.inference_mode()
@pytest.mark.parametrize("height, width, channels", [(1, 1, 3), (17, 1000, 3), (333, 501, 1), (40, 60, 4), (1080, 1920, 3)])
def test_any_size_and_color_is_encoded(model, height, width, channels):
    tokens = encode.encode_pictures(model, random_picture(height, width, 2, channels))
    assert tokens.shape == (2, 148, 96) and torch.isfinite(tokens).all()


@torch.inference_mode()
def test_a_batch_equals_its_pictures(model):
    pictures = random_picture(50, 70, batch=3)
    tokens = encode.encode_pictures(model, pictures)
    assert torch.equal(tokens[1:2], encode.encode_pictures(model, pictures[1:2]))
    assert relative(tokens[0], tokens[1]) > 0.01 and torch.equal(encode.encode_pictures(model, pictures.flip(0)), tokens.flip(0))


@torch.inference_mode()
def test_cancel_between_two_blocks_leaves_the_encoder_as_it_was(model, monkeypatch):
    import comfy.model_management as mm

    picture = random_picture(50, 70)
    before, calls = encode.encode_pictures(model, picture), []

    def stop():
        calls.append(0)
        if len(calls) == 5:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(mm.InterruptProcessingException):
        encode.encode_pictures(model, picture)
    monkeypatch.undo()
    assert torch.equal(encode.encode_pictures(model, picture), before)


@torch.inference_mode()
def test_progress_ends_at_its_total(model, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total)))
    encode.encode_pictures(model, random_picture(40, 40, 2))
    assert seen[-1] == (2 * model.steps, 2 * model.steps) and len(seen) == 2 * model.steps


@torch.inference_mode()
def test_masks_of_other_sizes_and_batches(model):
    pictures = random_picture(64, 64, batch=2)
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    one_for_all = encode.encode_pictures(model, pictures, mask)
    assert torch.equal(one_for_all, encode.encode_pictures(model, pictures, mask.repeat_interleave(4, 1).repeat_interleave(4, 2).expand(2, -1, -1)))
    assert torch.equal(one_for_all, encode.encode_pictures(model, pictures, mask[0])), "a mask without batch"
    other_side = encode.encode_pictures(model, pictures, mask.flip(2))
    assert relative(other_side, one_for_all) > 0.01
    refused("3 masks for 2 reference pictures", encode.encode_pictures, model, pictures, torch.ones(3, 8, 8))
    refused("Mask 2 of the reference is empty", encode.encode_pictures, model, pictures, torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]))


def test_weights_are_one_number_per_picture():
    assert encode.parse_weights("", 3).tolist() == [1, 1, 1]
    assert encode.parse_weights("1, 0.5; -2", 3).tolist() == [1, 0.5, -2]
    refused("2 weights for 3 reference pictures", encode.parse_weights, "1, 2", 3)
    refused("are not numbers", encode.parse_weights, "a lot", 1)
    refused("not all finite", encode.parse_weights, "inf", 1)


def test_ways_to_combine_a_batch():
    tokens = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.5, 0.25])
    each = encode.combine(tokens, "one each", weights)
    assert torch.equal(each[1], tokens[1] * 0.5)
    assert torch.allclose(encode.combine(tokens, "blend", weights), (each.sum(0) / 1.75)[None])
    assert torch.equal(encode.combine(tokens, "concatenate", weights), torch.cat([each[0], each[1], each[2]])[None])
    refused("sum to zero", encode.combine, tokens, "blend", torch.tensor([1.0, -1.0, 0.0]))


def test_text_speaks_before_the_picture_and_keeps_its_options():
    tokens = torch.randn(2, 148, 768)
    words = [[torch.randn(1, 77, 768), {"area": (8, 8, 0, 0), "start_percent": 0.5}], [torch.randn(1, 154, 768), {}]]
    out = encode.with_text(tokens, words)
    assert [tuple(entry[0].shape) for entry in out] == [(2, 225, 768), (2, 302, 768)]
    assert torch.equal(out[0][0][1, :77], words[0][0][0]) and torch.equal(out[0][0][:, 77:], tokens)
    assert out[0][1] == words[0][1] and out[0][1] is not words[0][1]
    refused("text is empty conditioning", encode.with_text, tokens, [])
    refused("2048 values per token, but SeeCoder gives 768", encode.with_text, tokens, tiny_cond(dim=2048))
    refused("comes 3 times and the picture 2 times", encode.with_text, tokens, [[torch.zeros(3, 77, 768), {}]])


def test_negatives_have_as_many_tokens_as_the_positive(tmp_path):
    positive = [[torch.randn(2, 148, 768), {"start_percent": 0.1}]]
    zeros = encode.negative_for("zeros", positive)
    assert zeros[0][0].shape == (2, 148, 768) and zeros[0][0].abs().max() == 0
    words = tiny_cond(seed=3)
    padded = encode.negative_for("text", positive, words)
    assert torch.equal(padded[0][0][:, :77], words[0][0]) and padded[0][0].shape[1] == 148 and padded[0][0][:, 77:].abs().max() == 0
    same = encode.negative_for("same as positive", positive)
    assert torch.equal(same[0][0], positive[0][0]) and same[0][1] is not positive[0][1]
    embedding = torch.randn(77, 768).half()
    for name, save in (("anime_ug.pth", lambda path: torch.save(embedding, path)), ("a.safetensors", lambda path: save_file({"embedding": embedding}, path))):
        save(str(tmp_path / name))
        read = encode.read_embedding(str(tmp_path / name), 768)
        assert torch.equal(read, embedding.float()[None])
        negative = encode.negative_for("anime file", positive, None, read)
        assert torch.equal(negative[0][0][0, :77], embedding.float()) and negative[0][0].shape == (1, 148, 768)
    refused("no negative text is connected", encode.negative_for, "text", positive)
    refused("negative text has 2048 values", encode.negative_for, "text", positive, tiny_cond(dim=2048))
    refused("no file is chosen", encode.negative_for, "anime file", positive)


def test_other_files_in_place_of_the_anime_file(tmp_path):
    torch.save({"a": torch.zeros(77, 768), "b": torch.zeros(3)}, tmp_path / "two.pth")
    refused("holds .77, 768., .3., but a negative embedding is one tensor", encode.read_embedding, str(tmp_path / "two.pth"), 768)
    torch.save(torch.zeros(77, 1024), tmp_path / "wide.pth")
    refused("is one tensor .tokens, 768.", encode.read_embedding, str(tmp_path / "wide.pth"), 768)
    (tmp_path / "text.pth").write_text("not found")
    refused("cannot be read as tensors", encode.read_embedding, str(tmp_path / "text.pth"), 768)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("echo evil > evil.txt",)


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    refused("cannot be read", encode.read_embedding, str(tmp_path / "evil.pth"), 768)
    refused("cannot be read", loader.load, str(tmp_path / "evil.pth"))
    assert not (tmp_path / "evil.txt").exists()


def test_a_model_that_wants_other_tokens_is_refused(model):
    wide = loader.from_state(random_state(small(width=768, decoder_layers=1, query_layers=3)), "official-width.safetensors")
    encode.check_model(tiny_sd15(channel_mult=(1, 1, 1, 1)), wide)
    refused("SDXL. wants 2048 values per token, but official-width.safetensors gives 768", encode.check_model, tiny_sdxl(), wide)
    refused("SD15. wants 768 values per token, but small.safetensors gives 96", encode.check_model, tiny_sd15(channel_mult=(1, 1, 1, 1)), model)
