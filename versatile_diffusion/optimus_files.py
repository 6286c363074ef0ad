"""Where Optimus' file and the two vocabularies lie."""

from __future__ import annotations

import os
from pathlib import Path

from .optimus_keys import FILE

FOLDER = "optimus"
WHERE = f"put {FILE} into models/optimus and reload the page"
NONE_FOUND = "no Optimus file in models/optimus"
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".sft")

# what a vocabulary may be called, in models/optimus or beside the model; the first is the name in the authors' repository
BERT_NAMES = ("bert-base-cased-vocab.txt", "bert-base-cased/vocab.txt", "bert-base-cased/tokenizer.json", "vocab.txt")
GPT2_NAMES = ("gpt2-vocab.json", "gpt2/vocab.json", "gpt2/tokenizer.json", "vocab.json")
# repositories in Hugging Face's cache on this machine, and the files there
BERT_CACHED = (("google-bert/bert-base-cased", "bert-base-cased"), ("vocab.txt", "tokenizer.json"))
GPT2_CACHED = (("openai-community/gpt2", "gpt2"), ("vocab.json", "tokenizer.json"))
BERT_WHERE = "save vocab.txt of google-bert/bert-base-cased (213 kB, on Hugging Face) as models/optimus/bert-base-cased-vocab.txt"
GPT2_WHERE = "save vocab.json of openai-community/gpt2 (1 MB, on Hugging Face) as models/optimus/gpt2-vocab.json"


def register() -> None:
    """Make models/optimus known to the host, beside what extra_model_paths.yaml names."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def choices() -> list[str]:
    """What the loader offers: model files in models/optimus, and those in models/vae that have Optimus in their name; or a line that says there are none."""
    import folder_paths

    register()
    own = [name for name in folder_paths.get_filename_list(FOLDER) if Path(name).suffix.lower() in SUFFIXES]
    others = [name for name in folder_paths.get_filename_list("vae") if "optimus" in name.lower()]
    return sorted({*own, *others}) or [NONE_FOUND]


def find(name: str) -> str:
    """Full path of a name from `choices`. Raises ValueError, one sentence, when it is not there (any more)."""
    import folder_paths

    register()
    for folder in (FOLDER, "vae"):
        if path := folder_paths.get_full_path(folder, name):
            return path
    raise ValueError(f"There is no Optimus file yet: {WHERE}." if name == NONE_FOUND else f"There is no file {name} in models/optimus: {WHERE}.")


def _vocabulary(names: tuple[str, ...], cached: tuple[tuple[str, ...], tuple[str, ...]], missing: str, model_path: str) -> str:
    import folder_paths
    from huggingface_hub import try_to_load_from_cache

    register()
    for folder in (*folder_paths.get_folder_paths(FOLDER), os.path.dirname(model_path)):
        for name in names:
            path = os.path.join(folder, *name.split("/"))
            if os.path.isfile(path):
                return path
    # only looks at the disk
    for repository in cached[0]:
        for name in cached[1]:
            path = try_to_load_from_cache(repository, name)
            if isinstance(path, str):
                return path
    raise ValueError(missing)


def bert_vocabulary(model_path: str) -> str:
    """Path of the vocabulary of BERT-base-cased: in models/optimus, beside the model, or in Hugging Face's cache. Raises ValueError, one sentence that says where to put it."""
    return _vocabulary(BERT_NAMES, BERT_CACHED, f"Encoding text needs BERT's vocabulary, which is not on this machine: {BERT_WHERE}.", model_path)


def gpt2_vocabulary(model_path: str) -> str:
    """The same for the vocabulary of GPT-2."""
    return _vocabulary(GPT2_NAMES, GPT2_CACHED, f"Writing text needs GPT-2's vocabulary, which is not on this machine: {GPT2_WHERE}.", model_path)
