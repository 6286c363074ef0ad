"""Optimus' networks against the tests' own formula and transformers' plain classes, and the drawing of words."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel

from palimpsest.tests.helpers import versatile_text as toy
from palimpsest.tests.helpers.versatile import relative
from palimpsest.versatile_diffusion import optimus
from palimpsest.versatile_diffusion.optimus_keys import Sizes, Tower
from palimpsest.versatile_diffusion.optimus_network import choose, kept, unfilled, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("optimus") / "toy.pth"
    torch.save(toy.optimus_state(), path)
    return optimus.load(str(path))


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def explicit_logits(state, latents, tokens):
    """GPT-2 with the latent as an extra token and in every embedding, whole texts at once, without a cache (reference sheet, 12.1), float64."""
    w = {key.removeprefix("decoder."): value.double() for key, value in state.items() if key.startswith("decoder.")}
    latents, count, width = latents.double(), tokens.shape[1], toy.TOKEN_WIDTH
    heads = width // 64

    def norm(x, name):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def split(x):
        return x.reshape(*x.shape[:2], heads, 64).transpose(1, 2)

    def dense(x, name):  # Conv1D: weights are [in, out]
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][tokens] + (latents @ w["transformer.linear_emb.weight"].T)[:, None] + w["transformer.wpe.weight"][1:count + 1]
    memories = latents @ w["transformer.linear.weight"].T
    # token i sees the extra one and tokens 0 to i
    seen = torch.ones(count, count + 1).tril(1).bool()
    for number in range(toy.LAYERS):
        layer = f"transformer.h.{number}"
        memory = memories[:, number * width:(number + 1) * width][:, None]
        q, k, v = dense(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(width, -1)
        k, v = split(torch.cat([memory, k], 1)), split(torch.cat([memory, v], 1))
        weights = (split(q) @ k.transpose(-1, -2) / 8).masked_fill(~seen, float("-inf")).softmax(-1)
        x = x + dense((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attn.c_proj")
        h = dense(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, f"{layer}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (1, 5, 3)])
def test_decoder_by_formula(model, pieces):
    """All tokens in one call, one by one as when writing, and in groups."""
    latents, tokens = seeded(3, toy.TEXT_LATENT), torch.randint(0, toy.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    decoder = model.network.decoder
    cache, parts = decoder.begin(latents), []
    for group in tokens.split(pieces, 1):
        logits, cache = decoder(group, latents, cache)
        parts.append(logits)
    expected = explicit_logits(toy.optimus_state(), latents, tokens)
    assert relative(torch.cat(parts, 1), expected) < 1e-5
    other = explicit_logits(toy.optimus_state(), latents.roll(1, 0), tokens)
    assert relative(other, expected) > 0.1, "the latent matters"


@torch.inference_mode()
def test_encoder_as_transformers_plain_class(model):
    """BertModel with the published names, text by text without padding; then the layer of means."""
    state = {key.removeprefix("encoder."): value for key, value in toy.optimus_state().items() if key.startswith("encoder.")}
    linear = state.pop("linear.weight")
    plain = BertModel(BertConfig(
        vocab_size=toy.BERT_VOCABULARY, hidden_size=toy.TOKEN_WIDTH, num_hidden_layers=toy.BERT_LAYERS, num_attention_heads=2, intermediate_size=toy.BERT_HIDDEN,
        max_position_embeddings=toy.BERT_POSITIONS,
    )).eval()
    plain.load_state_dict(state, strict=True)
    rows = [[2, 7, 9, 11, 3], [2, 8, 3], [2, 30, 31, 32, 33, 34, 35, 3]]
    expected = torch.cat([plain(torch.tensor([row])).pooler_output @ linear.T for row in rows])[:, :toy.TEXT_LATENT]
    tokens = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (8 - len(row)) for row in rows])
    assert relative(model.network.encoder(tokens, mask), expected) < 1e-5


def test_encoder_by_formula(model):
    """One layer of attention by hand would repeat transformers'; what is ours is the pooling and the half that is used."""
    seen = {}
    network = model.network.encoder
    handle = network.bert.encoder.register_forward_hook(lambda module, args, out: seen.update(states=out[0] if isinstance(out, tuple) else out.last_hidden_state))
    with torch.inference_mode():
        latents = network(torch.tensor([[2, 7, 9, 3]]), torch.ones(1, 4, dtype=torch.long))
    handle.remove()
    state = toy.optimus_state()
    pooled = torch.tanh(seen["states"][:, 0] @ state["encoder.pooler.dense.weight"].T + state["encoder.pooler.dense.bias"])
    assert relative(latents, pooled @ state["encoder.linear.weight"][:toy.TEXT_LATENT].T) < 1e-5


def test_full_size():
    """Parameters of the published file (reference sheet, 12.1), without memory."""
    published = Sizes(768, Tower(768, 12, 50260, 1024, 3072), Tower(768, 12, 28996, 512, 3072))
    network = unfilled(published)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    assert count(network.encoder) == 109_489_920 and count(network.decoder) == 132_109_824
    assert all(parameter.is_meta for parameter in network.parameters()) and not any(buffer.is_meta for buffer in network.buffers())


class Scripted:
    """A decoder that says the same logits whatever it reads, except after `turn` tokens."""

    def __init__(self, logits, turn=None, after=None):
        self.logits, self.turn, self.after, self.sizes, self.calls = logits, turn, after, Tower(8, 1, logits.shape[-1], 64, 8), []

    def begin(self, latents):
        return 0

    def __call__(self, tokens, latents, seen):
        self.calls.append(tokens.clone())
        logits = self.after if self.turn is not None and seen >= self.turn else self.logits
        return logits.expand(len(tokens), 1, -1), seen + 1


def test_writing_starts_stops_and_is_cut_as_published():
    likes_four, likes_end = torch.zeros(10), torch.zeros(10)
    likes_four[4], likes_end[9] = 50.0, 50.0
    decoder = Scripted(likes_four)
    assert write(decoder, torch.zeros(2, 3), length=30) == [[4] * 28] * 2, "30 tokens with both markers"
    assert decoder.calls[0].tolist() == [[8], [8]] and decoder.calls[1].tolist() == [[4], [4]], "the first is the begin marker"
    decoder = Scripted(likes_four, 3, likes_end)
    assert write(decoder, torch.zeros(1, 3)) == [[4] * 3] and len(decoder.calls) == 4, "nothing is computed after the end marker"
    ticks = []
    write(Scripted(likes_four), torch.zeros(1, 3), length=7, tick=lambda: ticks.append(1))
    assert len(ticks) == 5
    likes_four[2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write(Scripted(likes_four), torch.zeros(1, 3))


def test_drawing_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 2.0):
        drawn = torch.tensor([choose(logits, generator, temperature) for _ in range(4000)])
        shares = torch.bincount(drawn, minlength=5) / 4000
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), rtol=0, atol=0.03)
    assert {choose(logits, generator, 0.0) for _ in range(5)} == {0}


def test_top_k_and_top_p():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])  # probabilities 0.032, 0.644, 0.087, 0.237
    stays = lambda top_k, top_p: kept(logits, top_k, top_p).isfinite().tolist()
    assert stays(0, 1.0) == stays(0, 0.0) == stays(9, 1.0) == [True] * 4
    assert stays(1, 1.0) == [False, True, False, False] and stays(2, 1.0) == [False, True, False, True]
    # the token that crosses the threshold stays, the ones after it go
    assert stays(0, 0.6) == [False, True, False, False] and stays(0, 0.7) == [False, True, False, True] and stays(0, 0.9) == [False, True, True, True]
    assert stays(0, 1e-6) == [False, True, False, False], "one always stays"
    assert torch.equal(kept(logits, 0, 0.9)[1:], logits[1:])


@torch.inference_mode()
def test_texts_do_not_depend_on_each_other_nor_on_other_randomness(model):
    latents = seeded(3, toy.TEXT_LATENT)
    state = torch.get_rng_state()
    whole = write(model.network.decoder, latents, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert [write(model.network.decoder, latents[i:i + 1], seed=7 + i)[0] for i in range(3)] == whole
    assert write(model.network.decoder, latents, seed=8) != whole and len(write(model.network.decoder, latents, seed=2**64 - 1)) == 3
    greedy = write(model.network.decoder, latents, seed=1, temperature=0.0)
    assert greedy == write(model.network.decoder, latents, seed=2, temperature=0.0) == write(model.network.decoder, latents, seed=3, top_k=1)


def test_what_other_versions_of_transformers_have():
    """The cache's older name, and the buffers that older classes keep beside their weights."""
    from palimpsest.versatile_diffusion.optimus_network import _buffer, cache_name

    class Older:
        def forward(self, input_ids=None, past_key_values=None, cache_position=None):
            pass

    class Newer:
        def forward(self, input_ids=None, cache=None):
            pass

    assert cache_name(Older) == "past_key_values" and cache_name(Newer) == "cache"
    assert _buffer("position_ids", torch.empty(1, 5, dtype=torch.long, device="meta")).tolist() == [[0, 1, 2, 3, 4]]
    assert _buffer("bias", torch.empty(1, 1, 2, 2, dtype=torch.bool, device="meta")).tolist() == [[[[True, False], [True, True]]]]
    assert not _buffer("token_type_ids", torch.empty(1, 5, dtype=torch.long, device="meta")).any() and _buffer("masked_bias", torch.empty(())) == -1e4
    with pytest.raises(ValueError, match="has a buffer called other"):
        _buffer("other", torch.empty(2))
