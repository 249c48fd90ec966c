"""Real text as bytes: the documentation that ships inside every Python, or a file of the user's own."""

from pathlib import Path

import torch


def load(path: str | None = None) -> torch.Tensor:
    """The text's bytes as tokens (N,) int64 in [0, 256): those of the file, or of Python's help topics.

    Raises:
        OSError: the file can't be read.
        ValueError: it is empty.
    """
    if path is None:
        from pydoc_data.topics import topics

        content = "\n\n".join(topics.values()).encode()
    else:
        content = Path(path).read_bytes()
    if not content:
        raise ValueError(f"text must not be empty: {path}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def split(tokens: torch.Tensor, share: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Training text, and held-out text: the last `share` of it."""
    cut = len(tokens) - int(len(tokens) * share)
    return tokens[:cut], tokens[cut:]
