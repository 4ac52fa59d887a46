"""A real model behind OpenAI's `/v1/completions`, over HTTP on the loopback, with the ways in which such servers fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class CompletionsServer(ThreadingHTTPServer):
    """Serves one policy under one name. Its attributes say how it misbehaves."""

    daemon_threads = True

    def __init__(self, folder: Path, *, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name = name
        self.key = ""  # asked for, where there is one
        self.echoes = True
        self.silent = False  # writes nothing
        self.ends_by = ""  # the reason that it gives for the end of what it writes, where it is not the true one
        self.busy = 0  # answers 503 so many times first
        self.lives = 1_000_000  # completions after which every connection is cut
        self.births = 0
        self.lock = threading.Lock()
        self.completions: list[dict[str, Any]] = []  # those that were answered
        self.under_way = self.most_under_way = 0
        self.patience = 0.0  # seconds for which a request waits for a second one beside it, until one has come
        self.met = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def revive(self, lives: int) -> None:
        """Answer again, on new connections: a request that the dead server had not read yet is of nobody any more."""
        with self.lock:
            self.lives = lives
            self.births += 1

    def handle_error(self, *_: Any) -> None:
        """Keep quiet about cut connections."""

    @torch.inference_mode()
    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt: list[int] = asked["prompt"]
        ids_T = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=asked["max_tokens"],
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )[0]
        new = ids_T[len(prompt) :].tolist()
        text = "" if self.silent else self.tokenizer.decode(new, skip_special_tokens=True)
        ends = [text.index(stop) for stop in asked.get("stop") or [] if stop in text]
        ended = bool(ends) or self.tokenizer.eos_token_id in new
        choice = {
            "index": 0,
            "text": text[: min(ends, default=len(text))],
            "finish_reason": self.ends_by or ("stop" if ended else "length"),
            "logprobs": None,
        }
        if asked.get("logprobs"):
            shown = ids_T if asked.get("echo") and self.echoes else ids_T[len(prompt) :]
            choice["logprobs"] = self.tell_logprobs(ids_T, shown=len(shown))
        return {"object": "text_completion", "model": f"{self.name}-0711", "choices": [choice]}

    def tell_logprobs(self, ids_T: torch.Tensor, *, shown: int) -> dict[str, Any]:
        """Return the log-probability of each of the last `shown` ids, and the likeliest there; the very first has none."""
        logp_TV = self.model(ids_T[None]).logits[0].log_softmax(dim=-1)
        told, tops = [], []
        for place in range(len(ids_T) - shown, len(ids_T)):
            if place == 0:
                told.append(None)
                tops.append(None)
                continue
            logp_V = logp_TV[place - 1]
            best = int(logp_V.argmax())
            told.append(float(logp_V[ids_T[place]]))
            tops.append({self.tokenizer.decode([best]): float(logp_V[best])})
        return {"token_logprobs": told, "top_logprobs": tops}


class Handler(BaseHTTPRequestHandler):
    server: CompletionsServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.birth = self.server.births

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def say(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.say(200, {"data": [{"id": self.server.name}]})
        else:
            self.say(404, {"error": "no such path"})

    def do_POST(self) -> None:
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = self.headers.get("Authorization", "")
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            if server.under_way > 1:
                server.met.set()
            server.busy -= 1
            busy, dead = server.busy >= 0, server.lives <= 0 or self.birth != server.births
            server.lives -= not (busy or dead)
        server.met.wait(server.patience)
        try:
            if server.key and given != f"Bearer {server.key}":
                self.say(401, {"error": f"no access with {given}"})
            elif busy:
                self.say(503, {"error": "busy"})
            elif dead:
                self.close_connection = True  # without a word
            else:
                server.completions.append(asked)
                self.say(200, server.complete(asked))
        finally:
            with server.lock:
                server.under_way -= 1
