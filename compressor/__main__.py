"""`python -m compressor` is the command `compressor`."""

import sys

from compressor.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
