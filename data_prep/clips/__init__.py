"""Clips: timing, decoding of videos and animations, and the encoded form in which pairs store them."""
