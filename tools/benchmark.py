#!/usr/bin/env python3
"""Time the cascade beside Detectron2 and torchvision: the same as ``cascade-det benchmark``."""

import sys

from cascade_det.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
