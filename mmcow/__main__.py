# SPDX-License-Identifier: MIT
"""``python -m mmcow``: the command line."""

import sys

from mmcow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
