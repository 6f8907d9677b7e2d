"""The embedded pipeline: a complete Stable Diffusion 3 for the shapes world, small enough to train on two CPU cores."""
