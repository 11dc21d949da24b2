"""Vision-language models, frozen, that write captions of images."""
