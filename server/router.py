"""Run the router: `python -m server.router`. Everything is in `server.fleet.router`."""

if __name__ == "__main__":
    from server.quiet import end_silently

    end_silently()  # on Ctrl-C, while the imports below take their time

import sys

from server.fleet.router import main

if __name__ == "__main__":
    sys.exit(main())
