"""Noise schedules, ODE solvers and rollouts of rectified flows."""
