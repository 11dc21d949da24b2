"""Markers of diffusers' own tests, which `test_diffusers_mixins.py` runs."""

import os
import re
from pathlib import Path


def pytest_configure(config):
    theirs = Path(os.environ.get("DIFFUSERS_CHECKOUT", "/nonexistent"), "tests", "testing_utils.py")
    if theirs.is_file():
        for marker in set(re.findall(r"pytest\.mark\.(\w+)", theirs.read_text())):
            config.addinivalue_line("markers", f"{marker}: of diffusers")
