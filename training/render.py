"""Chat template -> token ids, and which of them are trained: the response and the token that ends it."""

from typing import Any


def render_prompt(tokenizer: Any, prompt: list[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to and including the cue for the assistant's next turn."""
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
