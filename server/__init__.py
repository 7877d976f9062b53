"""HTTP in, HTTP out: the aiohttp application, its APIs, and the command line."""
