"""The feature store."""

import torch

from palimpsest.attention_patches.blocks import Point
from palimpsest.attention_patches.rows import Feature
from palimpsest.attention_patches.store import KEEP_SIGMAS, FeatureStore, feature_bytes

POINT = Point("attn1", "output", 4)


def features(value=0.0):
    return {("source", POINT): Feature(torch.full((1, 4, 2), value), (2, 2))}


def test_features_are_found_by_sigma_and_cut():
    store = FeatureStore()
    store.put(1.0, features(1.0))
    store.put(1.0, features(2.0), cut=(0, (0, 1)))
    assert store.get(1.0)[("source", POINT)].tensor.max() == 1.0
    assert store.get(1.0, (0, (0, 1)))[("source", POINT)].tensor.max() == 2.0
    assert store.get(2.0) is None and store.get(1.0, "other") is None


def test_an_empty_pass_is_remembered():
    store = FeatureStore()
    store.put(1.0, {})
    assert store.get(1.0) == {}


def test_only_the_last_levels_are_kept():
    store = FeatureStore()
    for sigma in (5.0, 4.0, 3.0, 2.0):
        store.put(sigma, features())
    assert len(store) == KEEP_SIGMAS
    assert store.get(5.0) is None and store.get(3.0) and store.get(2.0)


def test_moving_keeps_later_features_on_the_device_too():
    store = FeatureStore()
    store.put(2.0, features())
    store.move(torch.device("meta"))
    store.put(1.0, features())
    assert {store.get(sigma)[("source", POINT)].tensor.device.type for sigma in (1.0, 2.0)} == {"meta"}


def test_size_in_bytes():
    assert feature_bytes(features()) == 4 * 2 * 4
