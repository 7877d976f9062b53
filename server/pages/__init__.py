"""Pages for people: to chat, and to read what the API takes. Whole files, which load nothing from elsewhere."""
