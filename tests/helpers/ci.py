"""What a test does where something it needs is not there."""
import os
from typing import NoReturn

import pytest


def absent(reason: str, excused: bool = False) -> NoReturn:
    """Skip the test; in CI (CI=true), where everything has to be there, fail it, unless `excused`."""
    if os.environ.get("CI", "").lower() in ("1", "true", "yes") and not excused:
        pytest.fail(reason)
    pytest.skip(reason)
