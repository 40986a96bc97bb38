#!/usr/bin/env python3
"""Draw training images with their boxes: the same as ``cascade-det show-data``."""

import sys

from cascade_det.commands.show_data import main

if __name__ == "__main__":
    sys.exit(main())
