"""Decoding of images, and the buckets of sizes."""
