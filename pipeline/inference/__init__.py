"""From weights and prompts to images."""
