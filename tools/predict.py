#!/usr/bin/env python3
"""Detect objects in images: the same as ``cascade-det predict``."""

import sys

from cascade_det.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
