"""Chat templates: a message of the user in a template, cut in two."""

from __future__ import annotations

import secrets
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvpress_moe.errors import UnsupportedModelError

_REMEDY = "Set another tokenizer.chat_template; None is plain text."
_MARK = secrets.token_hex(16)  # no text holds it


def cut_message(tokenizer: PreTrainedTokenizerBase, before: str, after: str = "") -> tuple[str, str]:
    """
    Put the message ``before + after`` into the chat template, up to where the answer begins, and cut it there.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With a chat template.
    before, after : str

    Returns
    -------
    (str, str)
        The first one ends with ``before``, the second one begins with ``after``. Some templates remove white space
        around a message.

    Raises
    ------
    UnsupportedModelError
        If the template fails, or if it does not print the message once and as it is.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": before + _MARK + after}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
    except Exception as error:  # a template is foreign code
        raise UnsupportedModelError(
            f"chat template: fails for one message of the user ({type(error).__name__}: {str(error)[:200]}). {_REMEDY}"
        ) from error
    head, *tails = text.split(_MARK)
    if len(tails) != 1:
        raise UnsupportedModelError(
            f"chat template: prints a message of the user {len(tails)} times, expected once. {_REMEDY}"
        )
    if not head.endswith(before.lstrip()) or not tails[0].startswith(after.rstrip()):
        raise UnsupportedModelError(
            f"chat template: changes a message of the user, expected its own characters. {_REMEDY}"
        )
    return head, tails[0]
