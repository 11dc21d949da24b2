"""Frozen encoders: LLMs (Hugging Face and GGUF), the VAE, quantization of hidden states."""
