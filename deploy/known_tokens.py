"""Token ids that a model has no embedding for.

A tokenizer may have more tokens than its model: one was added and the embedding not resized, or the
token is for images (Gemma 3). Texts without such a token work as ever, so it is met where one
occurs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from deploy.errors import ConfigError


def require_known_tokens(ids: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> None:
    """Refuse texts with a token that the model has no embedding for.

    Args:
        ids: Token ids of each text, of any shape.
        vocab_size: Number of rows of the embedding.

    Raises:
        ConfigError: There is such a token; the greatest is named.
    """
    greatest = max((int(np.max(some)) for some in ids if np.size(some)), default=0)
    if greatest >= vocab_size:
        raise ConfigError(
            f"the text has token {greatest}, and the model's embedding has tokens 0 to "
            f"{vocab_size - 1}: its tokenizer got tokens that the model does not know; resize the "
            f"embedding (resize_token_embeddings), or give a text without them"
        )
