"""Run the router: `python -m server.router`. Everything is in `server.fleet.router`."""

import sys

from server.fleet.router import main

if __name__ == "__main__":
    sys.exit(main())
