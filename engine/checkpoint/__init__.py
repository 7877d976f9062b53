"""Turn what the user named into weights on the device."""
