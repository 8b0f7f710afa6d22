"""An example worker for opd/rewards/remote.py: copy it beside your model, and replace ABOUT and `score`.

    python worker.py 8000        then, in training:  --train-rewards TASK=remote@http://localhost:8000

It needs Pillow and the model's own packages, nothing of ours. It listens on this machine only: it has no
password."""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat

ABOUT = {"name": "brightness", "about": f"mean of all channels, 0-1; Pillow {Image.__version__}"}


def score(picture: Image.Image, prompt: str, metadata: dict) -> float:
    """The score of one RGB picture."""
    return sum(ImageStat.Stat(picture).mean) / 3 / 255


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(ABOUT)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = []
        for image, prompt, metadata in zip(asked["images"], asked["prompts"], asked["metadata"], strict=True):
            picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
            scores.append(score(picture, prompt, metadata))
        self.answer({"scores": scores})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
