"""Instructions in files: everything comes back, the released code's files are read safely, nothing bad gets in."""

import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.common import files
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.visii import random_instruction
from palimpsest.visii.published import load_published
from palimpsest.visii.start import from_text, null_text
from palimpsest.visii.storage import load_instruction, save_instruction

TEXT = "a watercolor painting of a shiba inu"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "deep" / "one.instruction.safetensors")


def sentence(refused, path):
    text = str(refused.value)
    assert text.endswith(".") and "\n" not in text and os.path.dirname(path) not in text
    return text


@pytest.mark.parametrize("pooled", [None, 6])
@pytest.mark.parametrize("end", [6, None])
def test_everything_comes_back(path, pooled, end):
    before = random_instruction(pooled=pooled)
    before = before.with_tokens(before.tokens, end=end, text="caf\u00e9", info={"steps": 3, "errors": [0.5, 0.25], "direction_similarity": None})
    save_instruction(before, path, {"prompt": "{}"})
    after = load_instruction(path)
    for name in ("tokens", "null", "pooled"):
        a, b = getattr(before, name), getattr(after, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    assert (after.end, after.text, after.info) == (before.end, before.text, before.info)


def rewrite(**changes):
    """The same file with metadata or tensors changed; what becomes None is dropped."""

    def write(path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for name, value in changes.items():
            place = tensors if name in tensors else metadata
            place.pop(name)
            if value is not None:
                place[name] = value
        save_file(tensors, path, metadata=metadata)

    return write


def overwrite(data):
    def write(path):
        with open(path, "wb") as file:
            file.write(data)

    return write


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) * 2 // 3)


@pytest.mark.parametrize(
    "write, words",
    [
        (overwrite(pickle.dumps({"tokens": 1})), "not a readable safetensors file"),
        (overwrite(b""), "not a readable safetensors file"),
        (overwrite(bytes(range(256)) * 16), "not a readable safetensors file"),
        (truncate, "not a readable safetensors file"),
        (lambda path: save_file({"weight": torch.ones(3)}, path), "not an instruction"),
        (rewrite(format="palimpsest_trajectory"), "not an instruction"),
        (rewrite(version="9"), "version 9"),
        (rewrite(tokens=None), "damaged"),
        (rewrite(tokens=torch.ones(1, 12, 7)), "damaged"),
        (rewrite(null=torch.full((1, 12, 48), float("inf"))), "damaged"),
        (rewrite(end="40"), "damaged"),
        (rewrite(end='"a"'), "damaged"),
        (rewrite(info="{"), "damaged"),
        (rewrite(info="[]"), "damaged"),
        (rewrite(text=None), "damaged"),
    ],
)
def test_bad_files_are_one_sentence(path, write, words):
    save_instruction(random_instruction(), path)
    write(path)
    with pytest.raises(ValueError, match=words) as refused:
        load_instruction(path)
    sentence(refused, path)


def test_a_missing_file(path):
    with pytest.raises(ValueError, match="does not exist") as refused:
        load_instruction(path)
    sentence(refused, path)


def test_a_failed_save_leaves_the_old_file_and_no_other(path, monkeypatch):
    save_instruction(random_instruction(), path)
    before = open(path, "rb").read()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(ValueError, match="No space left on device") as refused:
        save_instruction(random_instruction(seed=1), path)
    sentence(refused, path)
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)] and open(path, "rb").read() == before


CLIP = WordClip(width=768)


def published(path, text=TEXT, **kind):
    """A file as the released code writes it: learned, null, null; a tensor that asks for gradients."""
    start = from_text(CLIP, text)
    tokens = start.tokens.clone()
    tokens[:, 1 : start.end] += 0.1
    torch.save(torch.cat([tokens, start.null, start.null]).to(**kind).requires_grad_(), path)
    return tokens, start


def test_a_file_of_the_released_code(tmp_path):
    path = str(tmp_path / "prompt_embeds_best.pt")
    tokens, start = published(path)
    found = load_published(path)
    assert torch.equal(found.tokens, tokens) and torch.equal(found.null, start.null) and found.end is None and not found.tokens.requires_grad
    for clip in (None, CLIP):
        assert load_published(path, TEXT, clip).end == start.end
    half = str(tmp_path / "half.pth")
    published(half, dtype=torch.float16)
    assert load_published(half, TEXT, CLIP).end == start.end


def test_a_text_or_an_encoder_that_does_not_belong_to_it_is_refused(tmp_path):
    path = str(tmp_path / "prompt_embeds_best.pt")
    published(path)
    with pytest.raises(ValueError, match="was not learned from this start text") as refused:
        load_published(path, "cats", CLIP)
    sentence(refused, path)
    with pytest.raises(ValueError, match="another text encoder") as refused:
        load_published(path, TEXT, WordClip(width=768, seed=2))
    sentence(refused, path)
    with pytest.raises(ValueError, match="one window of 77") as refused:
        load_published(path, "cat " * 90)
    sentence(refused, path)


class Trap:
    def __reduce__(self):
        return (sys.exit, ("the pickle was run",))


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: torch.save({"a": Trap()}, path), "holds code or other things besides tensors"),
        (lambda path: torch.save(Trap(), path), "holds code or other things besides tensors"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "holds code or other things besides tensors"),
        (overwrite(pickle.dumps(Trap(), protocol=2)), "holds code or other things besides tensors|cannot be read"),
        (lambda path: torch.save({"a": torch.ones(3, 77, 768)}, path), "holds a dict"),
        (lambda path: torch.save(torch.ones(1000, 4, 8, 8), path), r"shape \[1000, 4, 8, 8\]"),
        (lambda path: torch.save(torch.ones(2, 77, 768), path), r"shape \[2, 77, 768\]"),
        (lambda path: torch.save(torch.ones(3, 77, 768).long(), path), "shape"),
        (lambda path: torch.save(torch.full((3, 77, 768), float("nan")), path), "NaN"),
        (overwrite(b"PK\x03\x04 not a zip"), "cannot be read|holds code"),
        (overwrite(b""), "cannot be read"),
    ],
)
def test_other_files_of_torch_are_refused_unopened(tmp_path, write, words):
    path = str(tmp_path / "trap.pt")
    write(path)
    with pytest.raises(ValueError, match=words) as refused:
        load_published(path)
    sentence(refused, path)


def test_a_missing_file_of_torch(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_published(str(tmp_path / "none.pt"))


def test_null_texts_of_the_helpers_are_one_encoders():
    """What the checks above rest on."""
    assert torch.equal(null_text(CLIP)[0], null_text(WordClip(width=768))[0]) and not torch.equal(null_text(CLIP)[0], null_text(WordClip(width=768, seed=2))[0])
