"""``python -m deepseed.launcher``: the launcher alone, as one node starts it on another."""

import sys

from deepseed.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
