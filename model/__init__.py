"""The trained network: fusion of the LLMs' hidden states, the DiT, their settings and sizes."""
