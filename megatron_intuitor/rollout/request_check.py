"""What a request must fulfil, checked before any engine sees it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_intuitor.contracts import GenerateRequest


def check_requests(requests: Sequence[GenerateRequest], max_model_len: int) -> None:
    """Refuse prompts that are empty or leave no room for the response.

    Raises:
        ValueError: naming the request and the rule.
    """
    for index, request in enumerate(requests):
        prompt, response = len(request.prompt_token_ids), request.sampling.max_tokens
        if prompt == 0:
            raise ValueError(f"request {index} has an empty prompt; an engine needs at least one token")
        if prompt + response > max_model_len:
            raise ValueError(
                f"request {index} has {prompt} prompt tokens and asks for up to {response} more, but the engines were "
                f"started for {max_model_len}; lower data.max_prompt_tokens or the sampling's max_tokens"
            )
