"""Which split a prompt belongs to: a function of its text alone."""

from training.data.schema import digest_prompt


def choose_split(prompt: list[dict[str, str]], *, heldout_fraction: float) -> str:
    """Return `train` or `heldout` by a hash of the prompt.

    Equal prompts share a split, and a prompt keeps its split when rows are added, removed or reordered. A larger fraction
    only moves prompts from train to heldout.
    """
    position = int(digest_prompt(prompt)[:16], 16) / 2**64
    return "heldout" if position < heldout_fraction else "train"
