"""Scenes whose truth is known: their grammar, captions and rendering."""
