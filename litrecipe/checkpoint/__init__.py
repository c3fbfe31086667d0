"""Models on disk: Hugging Face folders, PEFT adapters, GGUF files, and training state."""
