"""How the answers of several networks become one. Importing it imports nothing else: operating points name it."""

from typing import Literal

Joining = Literal["last", "mean", "product"]
"""The last network's answer; the mean of their probabilities; or their product, which adds up evidence."""
