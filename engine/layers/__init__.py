"""The blocks models are made of: each owns its weights and knows how to load its share of them."""
