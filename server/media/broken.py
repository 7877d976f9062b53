"""The error of a picture or video that cannot be read."""


class BrokenMedia(Exception):
    """Say what is wrong with a file. The text goes behind the name of the client's field: "is no picture"."""
