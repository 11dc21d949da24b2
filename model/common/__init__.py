"""Helpers that all packages use: errors, settings, files, downloads, registries."""
