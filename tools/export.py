#!/usr/bin/env python3
"""Write a detector into one ONNX or torch.export file: the same as ``cascade-det export``."""

import sys

from cascade_det.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
