#!/usr/bin/env python3
"""Check data sets without training: the same as ``cascade-det check-data``."""

import sys

from cascade_det.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())
