"""`python -m radixloop`: the console script, where it is not on the PATH."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # First of all places, or a package `server` in the current folder would be taken for ours.
    sys.path.insert(0, str(Path(str(sys.modules["radixloop"].__file__)).parents[2]))
    from server.console import main

    sys.exit(main())
