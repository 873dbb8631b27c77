"""`python -m fitprune`: the `fitprune` command."""

import sys

from fitprune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
