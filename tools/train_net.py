#!/usr/bin/env python3
"""Train or evaluate a cascade: the same as ``cascade-det train``."""

import sys

from cascade_det.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
