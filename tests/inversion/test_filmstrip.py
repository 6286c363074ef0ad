"""Pictures of a path."""

from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_management
import pytest
import torch
from palimpsest.inversion import filmstrip, pictures

RED, BLUE = (torch.tensor(color).expand(8, 12, 3) for color in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]))


@pytest.mark.parametrize("latent_format", [comfy.latent_formats.SD15(), comfy.latent_formats.SDXL()])
def test_latents_become_the_hosts_preview_colors(latent_format):
    latents = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    found = filmstrip.latent_to_rgb(latent_format, latents)
    assert found.shape == (3, 5, 7, 3) and 0 <= found.min() and found.max() <= 1
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    expected = ((latents.movedim(1, -1) @ factors + bias + 1) / 2).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1.5 / 255)


def test_a_format_without_factors_shows_its_channels():
    found = filmstrip.latent_to_rgb(SimpleNamespace(latent_rgb_factors=None), torch.randn(2, 2, 4, 4))
    assert found.shape == (2, 4, 4, 3) and 0 <= found.min() and found.max() <= 1


def test_a_tile_keeps_the_aspect_and_has_room_for_its_caption():
    image = filmstrip.tile(RED, "red", longest=24)
    assert image.size == (26, 16 + filmstrip.CAPTION + 2)
    assert image.getpixel((13, 9)) == (255, 0, 0)
    assert filmstrip.tile(RED, "red", 24).tobytes() != filmstrip.tile(RED, "other", 24).tobytes(), "the caption is drawn"


def test_a_strip_lays_rows_of_tiles_from_left_to_right():
    found = filmstrip.strip([[(RED, "a"), (BLUE, "b")], [(BLUE, "c")]])
    tile_width, tile_height = filmstrip.tile(RED, "a").size
    assert found.shape == (1, 2 * tile_height, 2 * tile_width, 3)
    middle = tile_height // 3
    assert found[0, middle, tile_width // 2].tolist() == [1, 0, 0] and found[0, middle, tile_width * 3 // 2].tolist() == [0, 0, 1]
    assert found[0, tile_height + middle, tile_width // 2].tolist() == [0, 0, 1]
    assert found[0, tile_height + middle, tile_width * 3 // 2].max() < 0.2, "a short row leaves the rest dark"


def test_values_outside_the_range_are_clamped():
    assert filmstrip.tile(RED * 3 - 1, "", 24).getpixel((13, 9)) == (255, 0, 0)


class Model:
    def get_model_object(self, name):
        assert name == "latent_format"
        return comfy.latent_formats.SD15()


class Decoder:
    latent_channels = 4

    def decode(self, latents):
        return latents[:, :3].movedim(1, -1) * 2


def test_decoding_gets_the_vae_its_own_scaling_and_clamps():
    latents = torch.rand(2, 4, 4, 4) * 0.18215
    found = pictures.to_pictures(Model(), latents, Decoder())
    assert torch.allclose(found, (latents[:, :3].movedim(1, -1) / 0.18215 * 2).clamp(0, 1), atol=1e-5)


def test_frames_are_decoded_one_by_one_and_stay_in_order():
    frames = [torch.full((2, 4, 4, 4), value) * 0.18215 for value in (0.1, 0.2, 0.3)]
    assert pictures.decode_frames(Model(), frames, Decoder())[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6], abs=1e-5)
    assert torch.equal(pictures.decode_frames(Model(), frames), pictures.to_pictures(Model(), torch.cat(frames)))


def test_cancel_is_heard_before_the_first_frame():
    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            pictures.decode_frames(Model(), [torch.zeros(1, 4, 4, 4)], Decoder())
    finally:
        comfy.model_management.interrupt_current_processing(False)
