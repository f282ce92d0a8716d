"""A trained model on its way out: what was saved, its card, the hub, GGUF and Ollama."""
