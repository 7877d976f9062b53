"""Tensors in, tensors out: the only package that imports triton or flashinfer.

It imports nothing here: a package of the same name exists on the Hugging Face side and may be probed for.
"""

__version__ = "0.0.0"
