"""A real server with the API of OpenAI-compatible endpoints. It fails, stalls and talks nonsense on request."""

import contextlib
import http.server
import json
import re
import threading
import time

MODEL = "llama"
SECRET = "sk-no-one-may-read-this"


def parts(messages):
    """The prompt and both responses of a question in the default template."""
    texts = re.search(
        r"\[PROMPT\]\n(.*?)\n\[END OF PROMPT\].*\[RESPONSE A\]\n(.*?)\n\[END OF RESPONSE A\]"
        r".*\[RESPONSE B\]\n(.*?)\n\[END OF RESPONSE B\]",
        messages[0]["content"],
        flags=re.DOTALL,
    )
    return texts.groups()


def shorter(messages):
    """Prefers the response with fewer words."""
    _, first, second = parts(messages)
    lengths = len(first.split()), len(second.split())
    return f"I counted.\n{'tie' if lengths[0] == lengths[1] else 'AB'[lengths[0] > lengths[1]]}"


class Server:
    """The instructions for the server, and the requests that it received.

    Attributes:
      answer: maps a list of messages to the text of the answer.
      faults: replaces the next answers, one each, by (status, headers, body), or by a stall of a number of seconds.
      key: the only key that it accepts; None for any.
      asked: the bodies of all requests.
      keys: their Authorization headers.
      times: their times, in seconds.
      busy, busiest: the number of requests at this moment, and its maximum.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self):
        self.answer, self.faults, self.key, self.seconds = shorter, [], None, 0.0
        self.asked, self.keys, self.times = [], [], []
        self.busy = self.busiest = 0

    @property
    def questions(self):
        """The texts of all requests about responses, without the trial question."""
        texts = [json.dumps(body["messages"]) for body in self.asked]
        return [text for text in texts if "two plus two" not in text]

    def respond(self, body, key):
        """Status, headers and body of the answer to a request."""
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            fault = self.faults.pop(0) if self.faults else None
        try:
            if isinstance(fault, tuple):
                return fault
            time.sleep(fault or self.seconds)
            if self.key is not None and key != f"Bearer {self.key}":
                return 401, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}})
            if body["model"] != MODEL:
                return 404, {}, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
            message = {"role": "assistant", "content": self.answer(body["messages"])}
            usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
            return 200, {}, json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage})
        finally:
            with self.lock:
                self.busy -= 1


@contextlib.contextmanager
def judge_server():
    """The server; its `url` is that of the endpoint."""
    told = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                status, headers, content = 404, {}, "no such page"
            else:
                status, headers, content = told.respond(body, self.headers.get("Authorization"))
            with contextlib.suppress(ConnectionError):  # The client may have given up.
                self.send_response(status)
                for name, value in ({"Content-Length": len(content.encode())} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.url = f"http://127.0.0.1:{server.server_port}/v1"
        told.name = f"{told.url}#{MODEL}"
        yield told
        server.shutdown()
