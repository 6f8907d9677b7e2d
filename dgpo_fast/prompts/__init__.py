"""Prompts: where they come from, and which of them an iteration asks for."""

from dgpo_fast.prompts.sampler import PromptSampler
from dgpo_fast.prompts.sources import digest_of, load_prompts

__all__ = ["PromptSampler", "digest_of", "load_prompts"]
