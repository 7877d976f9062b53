"""Deploy to Ray Serve: `python -m server.ray_serve`. Everything is in `server.fleet.ray_serve`."""

if __name__ == "__main__":
    from server.quiet import end_silently

    end_silently()  # on Ctrl-C, while the imports below take their seconds

import sys

try:
    from server.fleet.ray_serve import build, main
except ModuleNotFoundError as error:
    if __name__ != "__main__" or (error.name or "").partition(".")[0] not in ("ray", "starlette"):
        raise
    sys.exit("python -m server.ray_serve needs Ray: pip install 'radixloop[ray]'")

__all__ = ["build", "main"]

if __name__ == "__main__":
    sys.exit(main())
