"""`dev.py train NAME ...`: the training of the mini models (mini/train.py) with the host on the path."""
import importlib
import os
from pathlib import Path

from .devices import accelerator
from .inprocess import put_host_on_path


def main(argv: list[str]) -> int:
    """Passes its arguments on; exit status of the training."""
    # the host's default attention on CPU splits the product; torch's own is several times faster there
    put_host_on_path(Path(os.environ["COMFYUI_PATH"]), ["--use-pytorch-cross-attention", *([] if accelerator() else ["--cpu"])])
    return importlib.import_module("palimpsest.mini.train").main(argv) or 0
