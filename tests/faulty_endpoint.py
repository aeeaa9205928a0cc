"""A faulty endpoint to practise on: an OpenAI-compatible server that knows the recorded answers and fails by seed.

    python tests/faulty_endpoint.py --port 8901 --faults 0.3 --seed 0     # Ctrl-C ends it

Which fault strikes follows from the seed, the prompt and how often that prompt was asked, so a class sees the same
evening twice. Transport faults (429, 500, hang, reset, half a body) strike a prompt at most three times in a row;
faults of the text (cut, malformed) stay with a prompt, as they would with a model at temperature 0.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

import typer

from speed_core.console import user_errors
from speed_core.data import prompts
from speed_core.data.teacher import recorded_rows
from speed_core.files import UserError

TRANSPORT = ("429", "500", "hang", "reset", "half body")
TEXT = ("cut", "malformed")
MODEL = "practice-teacher"


class FaultyEndpoint(ThreadingHTTPServer):
    """`faults`: share of calls that go wrong; `hang_seconds`: how long a hanging call keeps silent."""

    daemon_threads = True

    def __init__(self, port: int = 0, faults: float = 0.3, seed: int = 0, hang_seconds: float = 5.0):
        self.faults, self.seed, self.hang_seconds = faults, seed, hang_seconds
        self.asked: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.answers = {r["prompt_digest"]: r["answer"] for name in ("tasks", "seeds", "revisions") for r in recorded_rows(name)}
        super().__init__(("127.0.0.1", port), _Handler)

    def answer(self, prompt: str) -> str | None:
        """The right answer to a prompt, None for one that is refused."""
        return self.answers.get(prompts.text_digest(prompt))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def _draw(self, *parts: Any) -> float:
        """A number in [0, 1) that follows from the seed and `parts`."""
        h = hashlib.sha256(json.dumps([self.seed, *parts]).encode()).digest()
        return int.from_bytes(h[:8], "big") / 2**64

    def fault(self, key: str, attempt: int) -> str:
        """The fault of the `attempt`-th call (from 0) for a prompt, or nothing."""
        if attempt < 3 and self._draw(key, attempt) < self.faults:
            return TRANSPORT[int(self._draw(key, attempt, "which") * len(TRANSPORT))]
        if self._draw(key, "text") < self.faults / 3:
            return TEXT[int(self._draw(key, "text which") * len(TEXT))]
        return ""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyEndpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: dict[str, Any], headers: tuple[tuple[str, str], ...] = (), part: float = 1.0) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: int(len(data) * part)])
        self.close_connection = self.close_connection or part < 1

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "practice"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        prompt = request["messages"][-1]["content"]
        key = prompts.text_digest(prompt)
        with self.server.lock:
            attempt = self.server.asked[key]
            self.server.asked[key] += 1
            fault = self.server.fault(key, attempt)
            self.server.struck[fault or "none"] += 1
        text = self.server.answer(prompt)
        if text is None:
            return self._send(400, {"error": {"message": "this prompt was never recorded", "type": "invalid_request_error"}})
        if fault in ("429", "500"):
            headers = (("Retry-After", "0.2"),) if fault == "429" else ()
            return self._send(int(fault), {"error": {"message": f"practice fault {fault}", "type": "practice"}}, headers)
        if fault == "hang":
            time.sleep(self.server.hang_seconds)
            self.close_connection = True
            return None
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return None
        reason = "stop"
        if fault == "cut":
            text, reason = text[: len(text) // 2], "length"
        elif fault == "malformed":
            text = text.replace("}", "", 1).replace("]", "", 1)
        words = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        body = {"id": key[:16], "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
        self._send(
            200, body | {"usage": words | {"total_tokens": sum(words.values())}}, part=0.5 if fault == "half body" else 1.0
        )
        return None


def main(
    port: Annotated[int, typer.Option(help="port on this machine")] = 8901,
    faults: Annotated[float, typer.Option(min=0, max=1, help="share of calls that go wrong")] = 0.3,
    seed: Annotated[int, typer.Option(help="decides which calls")] = 0,
) -> None:
    """Serve the recorded answers behind an OpenAI-compatible interface that fails by seed (Ctrl-C ends it)."""
    try:
        server = FaultyEndpoint(port, faults, seed)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another") from None
    print(f"{server.url} answers as {MODEL!r}; in another terminal:", flush=True)
    print(
        "python -m speed_core run --profile smoke --only 01,02 --set teacher.kind='\"openai\"' "
        f"--set teacher.model='\"{MODEL}\"' --set teacher.base_url='\"{server.url}\"' --set teacher.timeout_seconds=3",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(dict(server.struck))


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
