"""Algorithms: each turns scored groups of images into gradients, and knows nothing of the trainer around it."""
