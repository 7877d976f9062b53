"""Between text and token ids: tokenizing, detokenizing, and grammars that hold answers to a form."""
