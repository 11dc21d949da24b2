"""Training of VAEs: what is special to those of clips, and to those with the latents of a teacher."""
