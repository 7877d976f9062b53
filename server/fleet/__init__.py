"""Several servers: router, Ray Serve, torchrun."""
