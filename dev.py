#!/usr/bin/env python3
"""The project's commands: `python dev.py demo`, `test`, `serve`, `score`, `bench`, `train` (`--help` lists the options).

Standard library only, any Python from 3.10 on. The first use makes `.venv`, installs ComfyUI's requirements and gets
ComfyUI itself; later uses find them there and start at once.
"""
import os
import sys

if sys.version_info < (3, 10):
    sys.exit("Palimpsest needs Python 3.10 or newer, this is %d.%d: run dev.py with a newer one." % sys.version_info[:2])

# an embedded Python (ComfyUI's portable build) does not put the script's folder on the path
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from devtools.bootstrap import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
