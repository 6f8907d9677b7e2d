"""What an OCR reward looks for: the text that a prompt asks for."""

from __future__ import annotations

from dgpo_fast.errors import UserError


def target_text(prompt: str) -> str:
    """What the image is to show in writing.

    Raises:
        UserError: neither the metadata nor quotes have a text, or it is empty.
    """
    text = getattr(prompt, "metadata", {}).get("text")
    if text is None:
        _, *quoted = prompt.split('"')
        text = quoted[0] if len(quoted) > 1 else ""
    if not isinstance(text, str) or not normalised(text):
        raise UserError(
            'rewards: ocr: expected a text to look for, as the prompt\'s metadata "text" or between double quotes; '
            f"the prompt is {str(prompt)!r}"
        )
    return text


def normalised(text: str) -> str:
    """As texts are compared: without spaces, in lower case."""
    return text.replace(" ", "").lower()
