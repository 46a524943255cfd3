"""``python -m f2pad_jax.commands`` runs the command ``f2pad``."""

import sys

from f2pad_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
