"""A vLLM server that samples the model which is trained here."""
