#!/usr/bin/env python3
"""Print a configuration and the origin of each value: the same as ``cascade-det print-config``."""

import sys

from cascade_det.commands.print_config import main

if __name__ == "__main__":
    sys.exit(main())
