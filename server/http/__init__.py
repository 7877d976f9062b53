"""What every route shares of HTTP: event streams, intake, keys, the access log."""
