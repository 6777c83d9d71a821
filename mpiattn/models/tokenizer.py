"""Text to tokens and back, by the library `tokenizers`; and the form that a model expects a conversation in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .folder import read_json
from .optional import library

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer cuts text before it looks for merges."""
CONTROL = 3
"""In a GGUF file, the type of a token that is no text."""


class Tokenizer:
    """Tokens of a text, and the text of tokens.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
    template : str, optional
        Of a chat, in Jinja, as in Hugging Face's `chat_template`.
    special : dict
        Text of the special tokens that a template may name, such as bos_token.
    """

    def __init__(self, inner: Any, template: str | None = None, special: Mapping[str, str] | None = None) -> None:
        self.inner, self.template, self.special = inner, template, dict(special or {})

    @property
    def size(self) -> int:
        """The number of tokens, special ones included."""
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text; with those that the model wants around it, such as a first one, or without."""
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without the special ones."""
        return str(self.inner.decode(tokens, skip_special_tokens=True))

    def chat(self, text: str) -> list[int]:
        """Return the tokens of a conversation in which a user has said this, and it is the model's turn.

        Where the model has no template, those of the text alone.
        """
        if self.template is None:
            return self.encode(text)
        sandbox = library("jinja2.sandbox")
        world = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        world.globals["raise_exception"] = refuse
        messages = [{"role": "user", "content": text}]
        try:
            template = world.from_string(self.template)
            filled = template.render(messages=messages, add_generation_prompt=True, **self.special)
        except library("jinja2").TemplateError as error:
            raise InputError(f"the model's chat template does not work: {error}") from None
        return self.encode(filled, special=False)


def refuse(message: str) -> None:
    """Raise what a template finds wrong."""
    raise library("jinja2").TemplateError(message)


def from_folder(path: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder."""
    tokenizers, file = library("tokenizers"), path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{file} is damaged: {error}") from None
    more = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    template = more.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text("utf-8")
    special = {name: more.get(name) for name in ("bos_token", "eos_token")}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items() if token}
    return Tokenizer(inner, template if isinstance(template, str) else None, texts)


def from_gguf(values: Mapping[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer that the values of a GGUF file describe: byte-level BPE."""
    tokenizers = library("tokenizers")
    known = cuts(tokenizers)
    given = {name: values.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "tokens", "merges", "token_type")}
    cut, texts = known.get(given["pre"] or "default"), given["tokens"]
    if given["model"] != "gpt2" or cut is None or not texts or given["merges"] is None:
        raise InputError(
            f"{path} has a tokenizer {given['model']!r}, cut {given['pre']!r}: only gpt2 cut as {', '.join(known)} "
            "is known; take the Hugging Face folder of this model"
        )
    vocabulary, ends = {text: number for number, text in enumerate(texts)}, "tokenizer.ggml.{}_token_id"
    merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
    try:
        inner = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, merges, ignore_merges=given["pre"] == "llama-bpe")
        )
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{path} has a damaged tokenizer: {error}") from None
    inner.pre_tokenizer, inner.decoder = cut, tokenizers.decoders.ByteLevel()
    kinds = given["token_type"] or []
    inner.add_special_tokens([text for text, kind in zip(texts, kinds, strict=False) if kind == CONTROL])
    numbers = {f"{name}_token": values.get(ends.format(name)) for name in ("bos", "eos")}
    special = {name: texts[number] for name, number in numbers.items() if number is not None and number < len(texts)}
    if values.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        first, number = special["bos_token"], numbers["bos_token"]
        process = tokenizers.processors.TemplateProcessing
        inner.post_processor = process(single=f"{first} $A", special_tokens=[(first, number)])
    return Tokenizer(inner, values.get("tokenizer.chat_template"), special)


def cuts(tokenizers: Any) -> dict[str, Any]:
    """Return how a text is cut before merges are looked for, by the name that llama.cpp gives it."""
    pre = tokenizers.pre_tokenizers
    plain = pre.ByteLevel(add_prefix_space=False)
    llama3 = pre.Split(tokenizers.Regex(LLAMA3), "isolated")
    return {
        "default": plain,
        "gpt-2": plain,
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), plain]),
        "llama-bpe": pre.Sequence([llama3, pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
    }
