"""Greedy completions of token ids from a running server."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

from serving.upstream.vllm_metrics import ServerInfo, parse_info
from tests.servers import Server


class Client:
    """Asks one server for greedy tokens; prompts and answers are token ids."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        self.model = self.openai.models.list().data[0].id

    def _create(self, prompt: list[int] | list[list[int]], num_tokens: int, **options: Any) -> Any:
        return self.openai.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0.0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
            **options,
        )

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the whole answer at once."""
        tokens: list[int] = self._create(prompt, num_tokens).choices[0].token_ids
        return tokens

    def greedy_streamed(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return the answer from a stream of events."""
        tokens: list[int] = []
        for event in self._create(prompt, num_tokens, stream=True):
            tokens += event.choices[0].token_ids or []
        return tokens

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Log-probability of every prompt token but the first, given those before it."""
        answer: Any = self.openai.completions.create(
            model=self.model, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
        given = answer.choices[0].prompt_logprobs[1:]
        return [
            entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], given, strict=True)
        ]

    def greedy_batch(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """All prompts in one request, so that they reach the scheduler in the same step."""
        choices = self._create(prompts, num_tokens).choices
        return [choice.token_ids for choice in sorted(choices, key=lambda choice: choice.index)]

    def greedy_together(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """All prompts at once, one connection each."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.greedy(prompt, num_tokens), prompts))

    def server_info(self) -> ServerInfo:
        """Return what the server says that it runs, as the gateway reads it."""
        with urllib.request.urlopen(f"{self.server.url}/metrics") as answer:
            return parse_info(answer.read())

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        return self.metrics(name)[0]

    def metrics(self, *names: str) -> tuple[float, ...]:
        """Several of them, of the same moment."""
        with urllib.request.urlopen(f"{self.server.url}/metrics") as answer:
            text = answer.read().decode()
        sums = []
        for name in names:
            values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
            assert values, f"{self.server.url}/metrics has no {name}"
            sums.append(sum(map(float, values)))
        return tuple(sums)
