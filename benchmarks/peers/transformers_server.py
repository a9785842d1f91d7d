"""Peer of `persimmon bench serve`: a plain server loop, one request after the other through `generate`, streamed.

    python benchmarks/peers/transformers_server.py PORT SETTINGS

It knows `GET /ready` and `POST /v1/completions` with token ids, which is what the load generator asks for.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers_model import build


class _Events(BaseStreamer):
    """Sends every token as soon as `generate` has picked it."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate hands over the prompt first
            self._prompt = False
            return
        text = self._handler.server.tokenizer.decode(value.reshape(-1)) or " "
        self._handler.send({"choices": [{"index": 0, "text": text, "finish_reason": None}]})

    def end(self) -> None:
        return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, settings: dict[str, Any]) -> None:
        self.model = build(settings)
        self.tokenizer = AutoTokenizer.from_pretrained(settings["directory"])
        self.turn = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        ids = torch.tensor([body["prompt"]])
        try:
            with self.server.turn, torch.inference_mode():
                output = self.server.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"], do_sample=False,
                    streamer=_Events(self),
                )  # fmt: skip
            count = output.shape[1] - ids.shape[1]
            self.send({"choices": [], "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": count}})
            self.write(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has left

    def send(self, event: dict[str, Any]) -> None:
        self.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


if __name__ == "__main__":
    _Server(int(sys.argv[1]), json.loads(sys.argv[2])).serve_forever()
