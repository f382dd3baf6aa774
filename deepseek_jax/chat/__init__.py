"""Chat templates: messages to ids, with a mask of what fine-tuning learns from, and answers back to messages."""

from deepseek_jax.chat.data import (
    ChatData,
    ChatJsonl,
    ChatParquet,
    ChatTfds,
    Messages,
    MultipleChoice,
    PromptResponse,
)
from deepseek_jax.chat.jinja import FolderTemplate, load_folder_template
from deepseek_jax.chat.plain import fim_prompt
from deepseek_jax.chat.registry import TEMPLATES, find_template, get_template
from deepseek_jax.chat.tagged import TOKENS
from deepseek_jax.chat.template import Encoded, Parsed, Piece, Template, encode_pieces

__all__ = [
    "TEMPLATES",
    "TOKENS",
    "ChatData",
    "ChatJsonl",
    "ChatParquet",
    "ChatTfds",
    "Encoded",
    "FolderTemplate",
    "Messages",
    "MultipleChoice",
    "Parsed",
    "Piece",
    "PromptResponse",
    "Template",
    "encode_pieces",
    "fim_prompt",
    "find_template",
    "get_template",
    "load_folder_template",
]
