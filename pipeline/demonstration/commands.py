"""Commands that a demo runs, each in a process of its own."""

import subprocess
import sys


def run(*arguments: str) -> None:
    """Run `python -m ...`, and stop the demo if it fails.

    Raises:
        SystemExit: with the command's exit code; the command has printed the reason.
    """
    code = subprocess.run([sys.executable, "-m", *arguments]).returncode
    if code:
        sys.exit(code)
