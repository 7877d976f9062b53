"""Deciding which tokens a step computes: ints and numpy arrays, without a device, an event loop or a clock."""
