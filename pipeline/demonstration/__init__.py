"""The demos: their time budget, and how their images are measured."""
