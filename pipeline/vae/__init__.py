"""Training of VAEs: what is special to those of clips."""
