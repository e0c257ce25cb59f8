"""The lab's word-level tokenizer with a chat template.

Control tokens are added outside the word vocabulary: tokenized with special tokens disabled, a text that spells one
becomes ``<unk>``.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from stepalign_lab.domain import OPERATORS

Tokenizer = Any
"""A transformers tokenizer: its attributes are typed too widely to be of use."""

MAX_STEPS = 7
CONTROL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
VERDICTS = ("correct", "unjustified", "incomplete", "incorrect")
WORDS = (
    "<unk>",
    *"0123456789",
    *OPERATORS,
    *("=", ";", ":", "is", "of", "so", "question", "reference", "attempt", "critique", "answer"),
    *VERDICTS,
    *(f"<{slash}step_{i}>" for i in range(1, MAX_STEPS + 1) for slash in ("", "/")),
    *("<answer>", "</answer>", "<verdict>", "</verdict>"),
)
MARKS = ("<copied/>", "<corrected/>", "<inserted/>", "<continued/>")
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer(*, critic: bool = False) -> Tokenizer:
    """The solver's tokenizer; the critic's has the four step marks besides."""
    words = (*WORDS, *MARKS) if critic else WORDS
    backend = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(list(CONTROL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
