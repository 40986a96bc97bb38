#!/usr/bin/env python3
"""Download and unpack COCO 2017: the same as ``cascade-det prepare-coco``."""

import sys

from cascade_det.commands.prepare_coco import main

if __name__ == "__main__":
    sys.exit(main())
