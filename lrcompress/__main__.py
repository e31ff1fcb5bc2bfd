"""``python -m lrcompress``: the command line ``lrcompress``."""

import sys

from lrcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
