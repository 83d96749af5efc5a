"""Models, tokenizers and configurations as Hugging Face lays them out."""
