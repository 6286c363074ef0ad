"""Captions: the same seed says the same words, attributes are named as often as promised, every word is known."""
from palimpsest.mini.captions import caption, vocabulary
from palimpsest.mini.scenes import edited, sample_scene
from palimpsest.mini.tokens import LENGTH, GrammarTokens


def test_the_same_seed_says_the_same_words():
    for seed in range(50):
        scene = sample_scene(seed)
        assert caption(scene, seed) == caption(scene, seed)
    assert len({caption(sample_scene(3), seed)[0] for seed in range(30)}) > 10, "paraphrases"


def test_each_attribute_is_named_with_probability_0_7():
    trials, hits = 0, dict.fromkeys(("shape", "color", "pattern", "size", "place", "background", "style"), 0)
    for seed in range(3000):
        _, named, whole = caption(sample_scene(seed, 1), seed)
        trials += 1
        for attribute in hits:
            hits[attribute] += attribute in named[0] or attribute in whole
    for attribute, count in hits.items():
        assert abs(count / trials - 0.7) < 0.035, attribute  # four standard deviations


def test_what_is_named_is_true_and_always_is_obeyed():
    for seed in range(300):
        scene = sample_scene(seed)
        text, named, whole = caption(scene, seed, 0.3, always=("shape", "place"))
        for obj, words in zip(scene.objects, named):
            assert {"shape", "place"} <= words.keys()
            assert all(getattr(obj, attribute) == value for attribute, value in words.items())
        assert all(getattr(scene, attribute) == value for attribute, value in whole.items())
        assert "  " not in text and "a orange" not in text


def test_twins_with_one_seed_differ_in_the_edited_words_only():
    for seed in range(60):
        scene = sample_scene(seed, 2)
        twin = edited(scene, "color", "teal", 1)
        first, second = caption(scene, seed, 1.0)[0].split(), caption(twin, seed, 1.0)[0].split()
        changed = [(a, b) for a, b in zip(first, second) if a != b]
        assert len(first) == len(second)
        assert all(pair == (scene.objects[1].color, "teal") or pair[0] == "an" for pair in changed)


def test_all_words_are_known_to_the_text_encoder():
    tokens = GrammarTokens()
    assert set(tokens.words) == set(vocabulary())
    for seed in range(500):
        ids = tokens.encode(caption(sample_scene(seed), seed, 1.0)[0])
        assert ids.shape == (LENGTH,) and tokens.unknown not in ids


def test_the_grammars_numbering_is_the_tokenizers():
    """A caption through our table gives the ids that the host's tokenizer gives it."""
    import comfy.sd1_clip

    tokens, tokenizer = GrammarTokens(), comfy.sd1_clip.SD1Tokenizer()
    for seed in range(40):
        text = caption(sample_scene(seed), seed)[0]
        host = [pair[0] for pair in tokenizer.tokenize_with_weights(text)["l"][0]]
        assert [tokens.ids[i] for i in tokens.encode(text)] == host


def test_unknown_words_share_one_vector():
    tokens = GrammarTokens()
    ids = tokens.encode("a purple elephant")
    assert (ids == tokens.unknown).sum() == 1
