#!/usr/bin/env python3
"""Find exit thresholds for a target: the same as ``cascade-det calibrate``."""

import sys

from cascade_det.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
