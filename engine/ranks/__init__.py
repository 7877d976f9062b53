"""The processes that compute one model together."""
