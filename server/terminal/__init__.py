"""Programs for the terminal, beside the server: a chat, a look at the machine, completions for the shell."""
