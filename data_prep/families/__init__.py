"""Encodings of the pairs: latents of the VAE, hidden states of the LLMs; and captions that models wrote."""
