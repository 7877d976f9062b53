"""Deploy to Ray Serve: `python -m server.ray_serve`. Everything is in `server.fleet.ray_serve`."""

import sys

from server.fleet.ray_serve import build, main

__all__ = ["build", "main"]

if __name__ == "__main__":
    sys.exit(main())
