#!/usr/bin/env python3
"""Score a file of predictions: the same as ``cascade-det eval-json``."""

import sys

from cascade_det.commands.eval_json import main

if __name__ == "__main__":
    sys.exit(main())
