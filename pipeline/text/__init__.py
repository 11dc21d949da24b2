"""From stored or freshly encoded hidden states to the network's text input."""
