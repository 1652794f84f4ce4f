"""A web application that says thank you first, and uploads afterwards.

    UPLOAD_TO=/srv/bucket gunicorn --chdir etc/examples --threads 8 upload:app
    curl -F file=@picture.jpg http://localhost:8000/

The upload runs in a process of its own, which outlives the web worker.
"""

import os
import shutil
import tempfile
from pathlib import Path

from flask import Flask, request
from flask.typing import ResponseReturnValue
from werkzeug.utils import secure_filename

from daemonkit import Background
from daemonkit.errors import BackgroundFull

app = Flask(__name__)
later = Background(max_workers=2, max_pending=100, timeout="10m")


def upload(spooled: str, name: str) -> None:
    """Bring the file to where it belongs: here a directory, elsewhere a bucket at the other end of the world."""
    target = Path(os.environ["UPLOAD_TO"]) / name
    part = target.with_name(f".{name}.part")
    shutil.copyfile(spooled, part)
    part.rename(target)
    os.unlink(spooled)


@app.post("/")
def receive() -> ResponseReturnValue:
    """Spool the file, promise to upload it, and answer."""
    file = request.files["file"]
    fd, spooled = tempfile.mkstemp(prefix="upload-")
    with open(fd, "wb") as spool:
        file.save(spool)
    try:
        begin = later.hold(upload, spooled, secure_filename(file.filename or "unnamed"))
    except BackgroundFull:
        os.unlink(spooled)
        return "too much to do; try again later\n", 503
    response = app.make_response(("thank you\n", 202))
    response.call_on_close(begin)  # the response is out
    return response
