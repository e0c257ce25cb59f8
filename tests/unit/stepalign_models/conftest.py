"""The tiny solver."""

from support.tiny_solver import model_path, save_adapter, tokenizer

__all__ = ["model_path", "save_adapter", "tokenizer"]
