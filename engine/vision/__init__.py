"""Pictures: how prompts write them, and the towers that make vectors of them."""
