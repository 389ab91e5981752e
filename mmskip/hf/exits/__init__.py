"""Early exit from the blocks of Hugging Face models."""
