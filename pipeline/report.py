"""Write a self-contained HTML page about a run: images, curves, data, starts and stops, settings.

python -m pipeline.report runs/demo
"""

import argparse
from pathlib import Path

from model.common.errors import command
from pipeline.reporting.page import build


@command
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/demo")
    print(build(parser.parse_args().run))


if __name__ == "__main__":
    main()
