"""The code blocks of README and docs."""

import re

# Pages of docs/recipes/ that tests/scripts/test_recipes.py runs.
RECIPES = (
    "huggingface.md",
    "lightning.md",
    "lora.md",
    "folder.md",
    "table.md",
    "graphs.md",
    "detection.md",
    "optimizers.md",
)


def blocks(page):
    """Pairs of a block's language and its text, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
