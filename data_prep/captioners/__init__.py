"""Captioners: they ask a vision-language model for captions, in this process or behind an endpoint."""
