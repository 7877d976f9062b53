"""From a client's JSON to requests of the engine."""
