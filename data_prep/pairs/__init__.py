"""The pairs: images decoded, resized and written as parts."""
