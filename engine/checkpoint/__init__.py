"""From what the user named to weights on the device."""
