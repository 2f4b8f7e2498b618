"""
Rebuilds model cards and figures from results files, and writes them next to the results.

    python recipes/rebuild_cards.py model_cards/*.json
"""

import sys
from pathlib import Path

from support.cards import rebuild


def main(paths: list[str]) -> None:
    for path in paths:
        rebuild(Path(path))


if __name__ == "__main__":
    main(sys.argv[1:])
