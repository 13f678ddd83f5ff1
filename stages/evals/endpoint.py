"""A model behind an endpoint that speaks OpenAI's protocol (vLLM's server, llama.cpp, a hosted service), over the standard library."""
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from prompts.records import Request, Result
from prompts.templates import Prompt
from stages.models.sampling import prompt_key
from stages.run.manifest import say
from stages.run.redaction import redacted

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # answers of a server that may do better in a moment
MISSING = Result(text="", prompt_tokens=0, generated_tokens=0, finish="missing")


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: followed, it would take the key to another place."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_Stay)


class Endpoint:
    """Answers requests at `url` (as in http://localhost:8000/v1), `connections` of them at a time.

    Plain prompts go to /completions and chats to /chat/completions, each with a seed made of (seed, key, sample), which the server
    may or may not heed. A time-out, a lost connection, a busy server or an empty answer is tried `retries` more times, waiting
    `wait_s`, twice that, and so on; then the result is "missing", counted in `missing`. The first trouble is said at once, and no other:
    a server that is not there would cost all tries of all requests before anyone knew. A request that the server says is too long is
    counted in `too_long`. The key is read from the environment variable `key_variable` and sent to this url alone.
    Raises ValueError for a url that is not http(s), or that holds a secret.
    """

    def __init__(self, url: str, model: str, *, seed: int, timeout_s: float = 120, retries: int = 4, wait_s: float = 1,
                 connections: int = 16, key_variable: str = "OPENAI_API_KEY"):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not the address of an endpoint: expected one such as http://localhost:8000/v1")
        if "@" in url.split("/", 3)[2] or "?" in url:
            raise ValueError(f"an endpoint's url has a name, password or query in it ({redacted(url)}), and urls are recorded: put the key "
                             f"in the environment variable {key_variable}")
        self.url, self.model, self.seed, self.key_variable = url.rstrip("/"), model, seed, key_variable
        self.timeout_s, self.retries, self.wait_s, self.connections = timeout_s, retries, wait_s, connections
        self.too_long = self.missing = 0
        self.troubled = False

    def generate(self, requests: list[Request]) -> list[Result]:
        """One result for each request, in order. Raises ValueError for what no retry can mend, such as a wrong key or model."""
        with ThreadPoolExecutor(self.connections) as pool:
            results = list(pool.map(self._ask, requests))
        self.too_long += sum(result.finish == "too_long" for result in results)
        self.missing += sum(result.finish == "missing" for result in results)
        return results

    def score(self, context: Prompt, continuation: str) -> list[float]:
        """Log-probability of each of the server's tokens of a plain continuation, of a completion that echoes its prompt.

        Raises ValueError for chat, and for a server that does not echo.
        """
        if not isinstance(context, str):
            raise ValueError("an endpoint scores plain prompts alone: a chat cannot be echoed")
        body = {"model": self.model, "prompt": context + continuation, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}

        def read(answer: dict) -> list[float]:
            known = answer["choices"][0]["logprobs"]
            end = len(context) + len(continuation)
            return [p for p, at in zip(known["token_logprobs"], known["text_offset"], strict=True) if len(context) <= at < end]
        found = self._post("completions", body, read)
        if not isinstance(found, list) or not found or None in found:
            raise ValueError(f"{self.url} gave no log-probabilities of the prompt: it has to support echo with logprobs")
        return found

    def _ask(self, request: Request) -> Result:
        plain = isinstance(request.prompt, str)
        body = {"model": self.model, "temperature": request.temperature, "max_tokens": request.max_tokens,
                "seed": prompt_key(f"{self.seed}/{request.key}/{request.sample}") >> 32,  # servers take 31 bits
                **({"stop": list(request.stop)} if request.stop else {}),
                **({"prompt": request.prompt} if plain else {"messages": list(request.prompt)})}
        if not isinstance(request.prompt, str) and request.prompt[-1]["role"] == "assistant":  # an open turn, in the words of vLLM's server
            body |= {"continue_final_message": True, "add_generation_prompt": False}

        def read(answer: dict) -> tuple[str | None, str, dict]:
            choice = answer["choices"][0]
            text = choice["text"] if plain else choice["message"]["content"]
            if not text and choice["finish_reason"] != "stop":
                raise LookupError("an empty answer")
            return text, choice["finish_reason"], answer.get("usage") or {}
        found = self._post("completions" if plain else "chat/completions", body, read)
        if found is None or isinstance(found, Result):
            return found or replace(MISSING)
        text, reason, usage = found
        if not {"prompt_tokens", "completion_tokens"} <= usage.keys():
            raise ValueError(f"{self.url} does not say how many tokens it used, so its cost cannot be counted: it has to send usage")
        return Result(text=text or "", prompt_tokens=usage["prompt_tokens"], generated_tokens=usage["completion_tokens"],
                      finish="stop" if reason == "stop" else "length")

    def _post(self, path: str, body: Mapping[str, Any], read: Callable[[dict], Any]) -> Any:
        """What `read` makes of the answer; a "too_long" result for a prompt without room; None when all tries failed."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        call = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            try:
                with OPENER.open(call, timeout=self.timeout_s) as answer:
                    return read(json.load(answer))
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace")
                if error.code in (400, 413, 422) and "context" in said and ("length" in said or "exceed" in said):
                    return Result(text="", prompt_tokens=0, generated_tokens=0, finish="too_long")
                if error.code not in AGAIN:
                    what = f"set {self.key_variable} in the environment" if error.code in (401, 403) else " ".join(said.split())[:300]
                    raise ValueError(f"{self.url}/{path} answered {error.code} {error.reason}: {what}") from None
                self._trouble(f"{error.code} {error.reason}")
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                self._trouble(str(error) or type(error).__name__)  # no connection, a time-out, half an answer, or not what was asked for
        return None

    def _trouble(self, what: str) -> None:
        if not self.troubled:
            self.troubled = True
            say(f"{self.url}: {what}; each request is tried {self.retries + 1} times, then its answer is missing and counts as wrong")
