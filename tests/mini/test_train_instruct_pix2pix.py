"""The recipe of the mini edit model: what it starts from, and that its file loads as the host's InstructPix2Pix model."""

import pytest
import torch

from palimpsest.mini import autoencoder, checkpoint, nets, optim, storage, tokens, train, train_instruct_pix2pix as recipe
from palimpsest.mini.instructions import triple, vocabulary


@pytest.fixture(scope="module")
def base():
    """A text-to-image member with random weights."""
    torch.manual_seed(0)
    words = tokens.GrammarTokens()
    unet, text = nets.new_unet(), nets.new_text_encoder(words.unknown + 1)
    named = {checkpoint.UNET_PREFIX + k: v.clone() for k, v in unet.state_dict().items()} | {checkpoint.TEXT_PREFIX + k: v.clone() for k, v in text.state_dict().items()}
    return {**named, "token_ids": torch.tensor(words.ids, dtype=torch.int32)}


def test_it_starts_from_the_base_with_a_wider_first_layer(base):
    state = recipe.start_from(base, tokens.GrammarTokens(vocabulary()))
    first = state[f"unet.{recipe.FIRST}"]
    old = base[checkpoint.UNET_PREFIX + recipe.FIRST]
    assert first.shape == (32, 8, 3, 3) and torch.equal(first[:, :4], old)
    # the picture comes unscaled, so the share is of the latent as the net knows it
    assert torch.allclose(first[:, 4:] / autoencoder.SCALE, recipe.SEEN * old)
    again = recipe.start_from({checkpoint.UNET_PREFIX + k[5:]: v for k, v in state.items() if k.startswith("unet.")} | {
        checkpoint.TEXT_PREFIX + k[5:]: v for k, v in state.items() if k.startswith("text.")} | {"token_ids": torch.tensor(tokens.GrammarTokens(vocabulary()).ids)},
        tokens.GrammarTokens(vocabulary()))
    assert all(torch.equal(again[k], state[k]) for k in state), "its own weights are taken as they are"


def test_captions_keep_their_vectors_and_instructions_get_new_ones(base):
    old, new = tokens.GrammarTokens(), tokens.GrammarTokens(vocabulary())
    table = recipe.start_from(base, new)["text.text_model.embeddings.token_embedding.weight"]
    before = base[checkpoint.TEXT_PREFIX + "text_model.embeddings.token_embedding.weight"]
    assert len(table) == len(new.ids) + 1 and torch.equal(table[-1], before[-1])
    assert all(torch.equal(table[new.compact[token]], before[old.compact[token]]) for token in old.ids)
    fresh = table[[new.compact[token] for token in set(new.ids) - set(old.ids)]]
    assert len(fresh) > 15 and fresh.std() > 0 and torch.equal(table, recipe.start_from(base, new)["text.text_model.embeddings.token_embedding.weight"])


def test_pairs_are_the_triples_before_and_after(tmp_path):
    net = autoencoder.Autoencoder().eval()
    latents = recipe.precompute(tmp_path, net, 3, triple, recipe.TRAIN_SEED)
    assert latents.shape == (3, 2, 4, 16, 16) and latents.dtype == torch.float16
    found = triple(recipe.TRAIN_SEED)
    from palimpsest.devtools.scoring import pictures

    expected = torch.stack([net.encode(pictures([scene]).movedim(-1, 1) * 2 - 1)[0] * autoencoder.SCALE for scene in (found.before, found.after)])
    assert torch.allclose(latents[0].float(), expected, atol=0.05)
    assert torch.equal(recipe.precompute(tmp_path, net, 3, triple, recipe.TRAIN_SEED), latents), "read from the folder"


def test_another_grammar_draws_its_pairs_anew(tmp_path):
    net = autoencoder.Autoencoder().eval()
    recipe.precompute(tmp_path, net, 2, triple, 0)
    recipe.precompute(tmp_path, net, 2, lambda seed: triple(seed + 1000), 0)
    assert len(list(tmp_path.glob("pairs-2-*.safetensors"))) == 2


def test_rows_are_triples_and_compounds_with_their_words(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "POOL", 3)
    monkeypatch.setattr(recipe, "COMPOUNDS", 3)
    words = tokens.GrammarTokens(vocabulary())
    rows = recipe.Rows(tmp_path, autoencoder.Autoencoder().eval(), words)
    latents, ids, more, end, count = rows.batch(300, torch.Generator().manual_seed(0))
    singles = {tuple(words.encode(triple(recipe.TRAIN_SEED + i).instruction).tolist()): i for i in range(3)}
    pairs = [recipe.compound(recipe.COMPOUND_SEED + i) for i in range(3)]
    sentences = {tuple(words.encode(pair.instruction).tolist()): 3 + i for i, pair in enumerate(pairs)}
    firsts = {(tuple(words.encode(pair.first.instruction).tolist()), tuple(words.encode(pair.second.instruction).tolist())): 3 + i for i, pair in enumerate(pairs)}
    stop, empty = words.compact[tokens.END], tuple(words.encode("").tolist())
    seen = dict.fromkeys(("single", "sentence", "joined", "alone"), 0)
    for latent, row, second, place, number in zip(latents, ids, more, end.tolist(), count.tolist()):
        row, second = tuple(row.tolist()), tuple(second.tolist())
        if row == empty:
            kind, source, expected = "alone", singles[second], (-recipe.GAP, second.index(stop))
        elif number:
            kind, source, expected = "joined", firsts[row, second], (row.index(stop), second.index(stop))
        else:
            kind, source, expected = ("single", singles[row], (row.index(stop), 0)) if row in singles else ("sentence", sentences[row], (row.index(stop), 0))
        assert torch.equal(latent, rows.latents[source]) and (place, number) == expected
        seen[kind] += 1
    assert 0.4 < seen["single"] / 300 < 0.6 and min(seen.values()) > 25


def test_cells_of_objects_count_more_in_either_picture():
    before, after = torch.full((2, 4, 16, 16), 0.5), torch.full((2, 4, 16, 16), -0.5)
    before[0, 1, 4:6, 4:6], after[1, 3, 8, 8:12] = 1.5, 0.5
    weights = recipe.cell_weights(before, after)
    assert weights.shape == (2, 1, 16, 16) and weights.mean() == pytest.approx(1)
    heavy = weights[0, 0, 4, 4]
    assert heavy / weights[0, 0, 0, 0] == pytest.approx(recipe.OBJECTS)
    assert (weights[0, 0, 4:6, 4:6] == heavy).all() and (weights[1, 0, 8, 8:12] == heavy).all() and (weights == heavy).sum() == 8


@pytest.mark.slow
def test_what_is_trained_loads_as_an_edit_model(base, tmp_path, monkeypatch):
    storage.write_weights(tmp_path / "text_to_image.safetensors", base, {})
    storage.write_weights(tmp_path / "autoencoder.safetensors", autoencoder.Autoencoder().state_dict(), {})
    for module in (checkpoint, train):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    monkeypatch.setattr(recipe, "POOL", 4)
    monkeypatch.setattr(recipe, "COMPOUNDS", 4)
    monkeypatch.setattr(recipe, "BATCH", 4)
    monkeypatch.setattr(optim, "WARMUP", 1)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    assert train.main(["instruct_pix2pix", "--minutes", "0.02"]) == 0
    assert (tmp_path / "instruct_pix2pix.safetensors").stat().st_size < 19_000_000
    import comfy.model_base

    model, _, _ = checkpoint.load("instruct_pix2pix")
    assert isinstance(model.model, comfy.model_base.SD15_instructpix2pix)
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    assert weight.shape[1] == 8 and weight[:, 4:].abs().max() > 0
    assert not isinstance(checkpoint.load("text_to_image")[0].model, comfy.model_base.IP2P)
