"""Several engines behind one facade."""
