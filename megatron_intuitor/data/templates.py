"""From a problem to the prompt that the model sees: template, chat format, token ids, length limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_intuitor.config import DataConfig
from megatron_intuitor.contracts import Prompt
from megatron_intuitor.data.reader import Row, read_rows

logger = logging.getLogger(__name__)

PLACEHOLDER = "{question}"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder; code that the folder ships is never run.

    Raises:
        ValueError: the folder is missing or holds no tokenizer that transformers can load.
    """
    if not path.is_dir():
        raise ValueError(f"model.path {path} is not a folder; it must be a Hugging Face folder with a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from model.path {path}: {error}. It must hold tokenizer.json (or the slow "
            "tokenizer's files) and tokenizer_config.json"
        ) from error


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, path: Path | None = None) -> list[Prompt]:
    """Read the problems of ``path`` (default ``config.path``) and format each as the config says.

    Prompts longer than ``config.max_prompt_tokens`` are refused, dropped or cut at the start, and counted in the log.

    Raises:
        ValueError: a bad row, template or chat format; an over-long prompt under ``over_long: refuse``; a prompt
            without tokens; or no prompt left.  The message names the row or the field.
    """
    source = path or config.path
    check_format(config, tokenizer)
    rows = read_rows(source, prompt_column=config.prompt_column, answer_column=config.answer_column)
    prompts = [_prompt(config, tokenizer, source, row) for row in rows]
    kept = list(_within_limit(config, tokenizer, source, prompts))
    if not kept:
        raise ValueError(
            f"{source}: all {len(prompts)} prompts are longer than data.max_prompt_tokens "
            f"({config.max_prompt_tokens}); raise it or set --data.over_long truncate"
        )
    return kept


def check_format(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that drops the question, and a format that the tokenizer cannot produce.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    if PLACEHOLDER not in config.template:
        raise ValueError(f"data.template is {config.template!r}, but it must contain {PLACEHOLDER}")
    if config.format == "chat" and not tokenizer.chat_template:
        raise ValueError("data.format is chat, but the tokenizer has no chat template; use --data.format raw")
    if config.format == "raw" and config.system_prompt:
        raise ValueError(
            "data.system_prompt is set, but data.format raw has no system message; put the text into data.template"
        )


def _prompt(config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: Path, row: Row) -> Prompt:
    """One formatted, tokenised prompt, of any length."""
    # str.format would trip over the braces of LaTeX in templates and questions.
    message = config.template.replace(PLACEHOLDER, row.question)
    text = _chat_text(config.system_prompt, message, tokenizer) if config.format == "chat" else message
    # A chat template writes its own special tokens; adding the tokenizer's again would double the BOS.
    token_ids = tokenizer.encode(text, add_special_tokens=config.format == "raw")
    if config.format == "raw":
        token_ids = _open_ended(token_ids, text, tokenizer)
    prompt_id = f"{source.stem}:{row.number}"
    if not token_ids:
        raise ValueError(f"{source}: prompt {prompt_id} has no tokens; its text is {text!r}")
    return Prompt(id=prompt_id, question=row.question, text=text, token_ids=tuple(token_ids), answer=row.answer)


def _chat_text(system_prompt: str, message: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation up to where the assistant's turn begins."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    text = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def _open_ended(token_ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Undo what some tokenizers add around raw text: a closing EOS, and a BOS where the text brings its own."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is not None and token_ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token):
        token_ids = token_ids[:-1]
    if bos is not None and token_ids[:2] == [bos, bos]:
        token_ids = token_ids[1:]
    return token_ids


def _within_limit(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: Path, prompts: Iterable[Prompt]
) -> Iterator[Prompt]:
    """Prompts as ``over_long`` wants them; logs how many were too long."""
    limit, over_long = config.max_prompt_tokens, 0
    for prompt in prompts:
        if len(prompt.token_ids) <= limit:
            yield prompt
            continue
        over_long += 1
        if config.over_long == "refuse":
            raise ValueError(
                f"{source}: prompt {prompt.id} has {len(prompt.token_ids)} tokens, more than data.max_prompt_tokens "
                f"({limit}); raise it or set --data.over_long drop or truncate"
            )
        if config.over_long == "truncate":
            kept = prompt.token_ids[-limit:]
            yield replace(prompt, token_ids=kept, text=_decoded(tokenizer, kept))
    if over_long:
        done = "dropped" if config.over_long == "drop" else "cut at the start"
        logger.warning("%s: %d prompts were longer than %d tokens and %s", source, over_long, limit, done)


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: tuple[int, ...]) -> str:
    """The text of token ids, special tokens included."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    assert isinstance(text, str)
    return text
