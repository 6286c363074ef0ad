"""`dev.py score --quick` for every score: the code path and loose limits, not the committed figures."""
import os
import subprocess
import sys

import pytest

from palimpsest.devtools import score

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", score.scores())
def test_quick_score(name, root, host):
    before = score.SCORES_FILE.read_bytes() if score.SCORES_FILE.is_file() else None
    done = subprocess.run([sys.executable, str(root / "devtools" / "run.py"), "score", name, "--quick"], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "COMFYUI_PATH": str(host)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert before == (score.SCORES_FILE.read_bytes() if score.SCORES_FILE.is_file() else None), "a quick run must not touch the committed figures"
