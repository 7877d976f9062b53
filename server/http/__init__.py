"""HTTP for every route: event streams, intake, keys, the access log."""
