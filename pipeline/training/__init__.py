"""The training loop: inputs, metrics, validation, previews."""
