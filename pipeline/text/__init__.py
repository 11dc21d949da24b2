"""Text input of the network: from stored or freshly encoded hidden states."""
