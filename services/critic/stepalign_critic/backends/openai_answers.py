"""The answers of servers with OpenAI's protocol, in the dialects that they have.

A finished answer is paid for, so whatever holds a text is read: the validator decides what the text is worth. Only an
answer without one is an error, and the caller gets the server's own words for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stepalign.retry_after import read_retry_after
from stepalign.types import FinishReason
from stepalign_critic.backends.base import Generation
from stepalign_critic.errors import (
    EngineError,
    EngineTimeoutError,
    SaturatedError,
    ServiceError,
    UnsupportedRequestError,
)

_OUT_OF_TOKENS = re.compile(r"length|limit|max_?(new_|output_|completion_)?tokens", re.IGNORECASE)
"""In the reason why an answer ended: ``length``, ``max_tokens``, ``model_length``, ``MAX_TOKENS``, ``token_limit``."""
_BUSY = frozenset({429, 503, 529})
_TOO_SLOW = frozenset({408, 504, 524})
_REFUSED = frozenset({400, 403, 413, 422})
REMEDIES = {
    **dict.fromkeys((301, 302, 303, 307, 308), "; it is elsewhere: critic.openai.base_url must name its own address"),
    401: "; set critic.openai.api_key_file to a file that holds a key which it takes",
    402: "; it wants to be paid",
    404: "; critic.openai.base_url ends before /chat/completions, mostly in /v1, and critic.openai.model names a model",
    405: "; critic.openai.base_url ends before /chat/completions, mostly in /v1",
    501: "; critic.openai.base_url names no server of chat completions",
}
"""What an operator can do about a status that no request is to blame for."""
AFTER_TIMEOUT_SECONDS = 60.0
"""When to ask again for what took too long, unless the server says it."""
_MOST_COUNTED = 10**12
_MOST_DIGITS = 400
_END_OF_STREAM = "[DONE]"
_MOST_QUOTED = 400
_LINK = re.compile(r"\s*For (?:more|further) information,? (?:check|visit|see):? \S+", re.IGNORECASE)
_SECRET = re.compile(r"(?i)\bbearer\s+\S+|\b(?:sk|pk|gsk|hf|xai)[-_][\w*.\-…]{4,}|\bAIza[\w\-]{20,}|\S*\*{3,}\S*")
_HIDDEN = "[hidden]"
_LINE_END = re.compile(r"\r\n|\r|\n")
_THINKING = ("thinking", "reasoning", "reasoning_text")
_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")
_MESSAGE_KEYS = ("error", "message", "detail", "msg", "error_description", "title")


@dataclass(frozen=True)
class Answer:
    """An answer as it came. ``key`` is the API key that was sent, which no message may hold."""

    status: int
    content_type: str
    retry_after: str
    content: bytes
    key: str | None = None


def read_completion(answer: Answer) -> Generation:
    """The model's text. Raises ServiceError when there is none."""
    if not 200 <= answer.status < 300:
        raise _error(answer.status, _quote(_parsed(answer), answer), answer)
    completion = _parsed(answer)
    choice = _choice(completion)
    if choice is None or choice.get("error"):
        failed = completion if choice is None else choice
        hidden = _hidden_status(failed)
        if hidden is not None:
            raise _error(hidden, _quote(failed, answer), answer)
        raise EngineError(f"the model's server sent no chat completion: {_quote(failed, answer)}")
    if isinstance(completion, _CutStream):
        raise EngineError("the model's server ended its stream before the end of the answer")
    read, written = _usage(completion)
    text, remark = _said(choice)
    return Generation(whole(text), _finish_reason(choice), read, written, remark)


def status_of(answer: Answer) -> int:
    """The answer's status; where its body is an error with a status, as gateways send it with 200, that one."""
    if not 200 <= answer.status < 300:
        return answer.status
    completion = _parsed(answer)
    choice = _choice(completion)
    return _hidden_status(completion if choice is None else choice) or answer.status


def words_of(answer: Answer) -> str:
    """The server's own words, fit for a message to a caller."""
    return _quote(_parsed(answer), answer)


def whole(text: str) -> str:
    """``text`` without halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _error(status: int, words: str, answer: Answer) -> ServiceError:
    """The error for a status, which may also stand inside an answer of status 200."""
    retry_after = read_retry_after(answer.retry_after)
    said = f"status {status}: {words}{REMEDIES.get(status, '')}"
    if status in _BUSY:
        return SaturatedError(f"the model's server takes no more requests now: {said}", retry_after)
    if status in _TOO_SLOW:
        after = AFTER_TIMEOUT_SECONDS if retry_after is None else retry_after
        return EngineTimeoutError(f"the model's server gave up waiting for its model: {said}", after)
    if status in _REFUSED:
        return UnsupportedRequestError(f"the model's server refuses this request: {said}")
    return EngineError(f"the model's server answered with {said}", retry_after)


def _hidden_status(holder: Any) -> int | None:
    """The status in a body's error; 500 where the error names none, None without an error."""
    error = holder.get("error") if isinstance(holder, dict) else None
    if not error:
        return None
    code = error.get("code") or error.get("status") if isinstance(error, dict) else None
    return int(code) if isinstance(code, int | str) and re.fullmatch(r"[45][0-9]{2}", str(code)) else 500


def _parsed(answer: Answer) -> Any:
    """The body as JSON, a stream's events as the one completion that they make up; None where it is neither."""
    try:
        content = answer.content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if answer.content_type.startswith("text/event-stream") or re.match(r"\s*(data|event|id|retry)?:", content):
        return _joined(_events(content))
    return read_json(content)


def read_json(text: str) -> Any:
    """The value; None where the text is no JSON."""
    try:
        return json.loads(text, parse_int=_whole_number)
    except (ValueError, RecursionError):
        return None


def _whole_number(text: str) -> int | float:
    """Python refuses integers of thousands of digits, which would cost the answer that they stand beside."""
    return int(text) if len(text) <= _MOST_DIGITS else float(text)


class _CutStream(dict[str, Any]):
    """The completion of a stream that neither ended its answer nor itself."""


def _events(content: str) -> Iterator[dict[str, Any] | None]:
    """The chunks of a stream, and None for the mark of its end.

    A server that streams though it was not asked to says the same in more words.
    """
    # Not by splitlines, which ends a line inside a text as well, at U+2028.
    for line in _LINE_END.split(content):
        name, _, value = line.partition(":")
        if name != "data":
            continue
        if value.strip() == _END_OF_STREAM:
            yield None
            continue
        chunk = read_json(value)
        if isinstance(chunk, dict):
            yield chunk


def _joined(chunks: Iterator[dict[str, Any] | None]) -> dict[str, Any]:
    texts: dict[str, list[str]] = {name: [] for name in _TEXTS}
    calls: Any = None
    choice: dict[str, Any] = {}
    whole_stream: dict[str, Any] = {}
    index: Any = None
    ended = False
    for chunk in chunks:
        if chunk is None:
            ended = True
            continue
        whole_stream.update({key: chunk[key] for key in ("usage", "error") if chunk.get(key)})
        # Settings can ask for more choices than one. Their parts come in turn, and the first one's are read.
        part = next((part for part in _choices(chunk) if index is None or part.get("index", 0) == index), None)
        if part is None:
            continue
        index = part.get("index", 0)
        choice.update({key: part[key] for key in ("finish_reason", "error") if part.get(key)})
        message = _message(part)
        for name, said in texts.items():
            said.append(_text(message.get(name)))
        calls = calls or message.get("tool_calls")
        whole_stream["choices"] = [choice]
    choice["message"] = {name: "".join(said) for name, said in texts.items()} | {"tool_calls": calls}
    if whole_stream.get("error"):
        return {"error": whole_stream["error"]}
    return whole_stream if ended or choice.get("finish_reason") else _CutStream(whole_stream)


def _choice(completion: Any) -> dict[str, Any] | None:
    """The first choice, where it is one."""
    choices = completion.get("choices") if isinstance(completion, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _choices(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _message(choice: dict[str, Any]) -> dict[str, Any]:
    found = (choice.get("message"), choice.get("delta"), {"content": choice.get("text")})
    return next(message for message in found if isinstance(message, dict))


def _said(choice: dict[str, Any]) -> tuple[str, str | None]:
    """The model's text; where it has none, the words that stand in its place, and what they are."""
    message = _message(choice)
    text = _text(message.get("content"))
    reason = choice.get("finish_reason")
    if text.strip():
        return text, f"the server ended it as {reason!r}" if reason == "content_filter" else None
    refusal = _text(message.get("refusal"))
    if refusal:
        return refusal, "the model refuses to answer"
    if message.get("tool_calls") or message.get("function_call"):
        return "", "the model calls a tool in place of an answer"
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    if thought:
        # As a model writes it whose server leaves its thinking in the text.
        return f"<think>{thought}", "all of the answer is in the server's field for thinking"
    return text, f"the answer is empty, ended as {whole(reason[:60])!r}" if isinstance(
        reason, str
    ) else "the answer is empty"


def _text(content: Any, depth: int = 4) -> str:
    """Text, also from a part, a list of parts and the ``value`` in a part; thinking among them is passed over."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and depth:
        return "".join(_text(part, depth - 1) for part in content)
    if not isinstance(content, dict) or not depth or content.get("type") in _THINKING:
        return ""
    return _text(content.get("text", content.get("value")), depth - 1)


def _finish_reason(choice: dict[str, Any]) -> FinishReason:
    """Servers name the end of an answer in many ways, and all that matters is whether its budget ran out."""
    reason = choice.get("finish_reason")
    named = reason.get("type") if isinstance(reason, dict) else reason
    cut = isinstance(named, str) and _OUT_OF_TOKENS.search(named) is not None
    return FinishReason.LENGTH if cut else FinishReason.STOP


def _usage(completion: Any) -> tuple[int, int]:
    """Tokens read and written; 0 where the server does not tell."""
    usage = completion.get("usage")
    told = usage if isinstance(usage, dict) else {}
    names = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    read, written = (_count(told.get(name, told.get(other))) for name, other in names)
    return read, written


def _count(value: Any) -> int:
    try:
        count = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return 0
    return int(count) if math.isfinite(count) and 0 <= count <= _MOST_COUNTED else 0


def _quote(body: Any, answer: Answer) -> str:
    """The words of an error's body: short, on one line, without secrets and links."""
    found = _message_in(body)
    words = answer.content[:4096].decode("utf-8-sig", "replace") if found is None else found
    words = whole(words)
    if answer.key is not None:
        words = words.replace(answer.key, _HIDDEN)
    # Control characters, and those that turn the direction of a line or show nothing.
    words = " ".join("".join(char if char.isprintable() else " " for char in words[:4096]).split())
    words = _SECRET.sub(_HIDDEN, _LINK.sub("", words))
    return (words if len(words) <= _MOST_QUOTED else f"{words[: _MOST_QUOTED - 1]}…") or "no words"


def _message_in(body: Any, depth: int = 4) -> str | None:
    """The message in an error's body, of the shapes that servers give it; None where none is known."""
    if isinstance(body, str):
        return body
    if isinstance(body, list) and depth:
        found = [_message_in(part, depth - 1) for part in body[:3]]
        return "; ".join(part for part in found if part) or None
    if not isinstance(body, dict) or not depth:
        return None
    said = next((m for key in _MESSAGE_KEYS if (m := _message_in(body.get(key), depth - 1))), None)
    place = body.get("loc")
    if said is None or not isinstance(place, list):
        return said
    return f"{'.'.join(str(part) for part in place if isinstance(part, str | int))}: {said}"
