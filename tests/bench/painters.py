"""A painter for tests of the racing, as a script: `painters.py REQUEST`."""

import json
import os
import sys
import time

from benchmarks.bench.protocol import serve
from hypersd_export.errors import ModelError


class Fake:
    """Works for `work_s` a picture; its pictures are of one colour, which is the seed."""

    def __init__(self, request):
        self.request, self.drawn = request, 0

    def load(self):
        print("a library says hello")
        if self.request.get("refuses"):
            raise ModelError("no such weights")
        return {"versions": {"fake": "1"}, "pid": os.getpid(), **self.request.get("facts", {})}

    def draw(self, seed, images):
        self.drawn += 1
        if self.drawn == self.request.get("dies_at"):
            print("last words", file=sys.stderr)
            os._exit(3)
        if self.drawn == self.request.get("fails_at"):
            raise ZeroDivisionError("a bug\nin two lines")
        time.sleep(self.request.get("work_s", 0.0) * images)
        seconds = self.request.get("seconds", {"unet": 0.25 * images})
        return seconds, [[[[seed % 256] * 3] * 4] * 2] * images


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    sys.exit(serve(lambda: Fake(request)))
