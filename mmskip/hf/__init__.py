"""How blocks of transformers are run otherwise: one folder per mechanism."""
