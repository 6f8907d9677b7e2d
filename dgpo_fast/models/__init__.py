"""Stable Diffusion 3 models: where they come from, how they run, and the three views a policy has of one."""
