"""Model families: one file a family, which says what differs from Llama and nothing else."""
