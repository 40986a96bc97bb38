"""``python -m cascade_det``: the same as ``cascade-det``."""

import sys

from cascade_det.commands.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m cascade_det"))
