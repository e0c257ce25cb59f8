"""Tokenizers of the kinds that models have, small: what they decode by is that of the model's own.

======== =============================================================================================================
Qwen     bytes, its pattern for words, added tokens that are special and that are not
Llama 3  bytes, its pattern for words, special tokens
SmolLM2  bytes, digits one by one, special tokens
Llama 2  SentencePiece with byte fallback; a space is put before a text and taken off again
Gemma    SentencePiece with byte fallback; runs of spaces and line breaks are tokens
======== =============================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
_CORPUS = [
    "Step 1: the sum of 3 and 4 is 7.\nStep 2: 7 times 7 is 49.\n\nThe answer is \\boxed{49}.",
    "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 49 </step_2> <answer> 49 </answer>",
    "naïve café — Straße, Ελληνικά, 你好世界, 你们, 数学, नमस्ते, 👍🏽 👩\u200d👩\u200d👧 ∑ ≥ ≤ ½",
    "def f(x):\n    return x ** 2  # wow\n\t\tpass\r\n",
]
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] + '\n' + m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def _wrapped(backend: Tokenizer, eos: str) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|start|>", "<|end|>", eos)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, chat_template=_TEMPLATE)


def _byte_level(eos: str, *before: Any, added: tuple[str, ...] = ()) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS * 3, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return _wrapped(backend, eos)


def _qwen() -> Any:
    words = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
    return _byte_level("<|im_end|>", words, added=("<think>", "</think>", "<tool_call>"))


def _llama3() -> Any:
    return _byte_level("<|eot_id|>", pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"))


def _smollm2() -> Any:
    return _byte_level("<|im_end|>", pre_tokenizers.Digits(individual_digits=True))


def _sentencepiece(eos: str, added: tuple[str, ...] = ()) -> Tokenizer:
    """Words begin with ``▁``; letters that are no piece of their own are written as the bytes of UTF-8."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    texts = [text.replace(" ", "▁") for text in _CORPUS if text.isascii()]
    learned.train_from_iterator([*texts * 3, "▁你好", "▁né"], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces = dict.fromkeys(["<unk>", "<s>", eos, *[f"<0x{byte:02X}>" for byte in range(256)], *model["vocab"]])
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "▁▁", "▁▁▁"])}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", eos)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return backend


def _llama2() -> Any:
    backend = _sentencepiece("</s>")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _wrapped(backend, "</s>")


def _gemma() -> Any:
    backend = _sentencepiece("<eos>", added=("\n", "\n\n", "\n\n\n", "▁▁▁▁"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(backend, "<eos>")


KINDS: Mapping[str, Callable[[], Any]] = {
    "qwen": cache(_qwen),
    "llama3": cache(_llama3),
    "smollm2": cache(_smollm2),
    "llama2": cache(_llama2),
    "gemma": cache(_gemma),
}
