"""The same web application, with a daemon that uploads: what it was asked to do outlives the web server and the daemon.

    daemonkit start etc/examples/upload_task.py
    UPLOAD_TO=/srv/bucket gunicorn --chdir etc/examples --threads 8 upload_task:app
    curl -F file=@picture.jpg http://localhost:8000/
    daemonkit queue stats

Both must mean the same broker: run them as the same user, or set DAEMONKIT_BROKER.
"""

import os
import shutil
import tempfile
from pathlib import Path

from flask import Flask, request
from flask.typing import ResponseReturnValue
from werkzeug.utils import secure_filename

from daemonkit import main, task

app = Flask(__name__)


@task(queue="upload", max_retries=10, timeout="10m", concurrency=2)
def upload(spooled: str, target: str) -> None:
    """Bring the file to where it belongs; done a second time, it finds that it is there."""
    if not os.path.exists(spooled):
        return
    part = f"{target}.part"
    shutil.copyfile(spooled, part)
    os.rename(part, target)
    os.unlink(spooled)


@app.post("/")
def receive() -> ResponseReturnValue:
    """Spool the file, put the task, and answer: the upload is not waited for, and is not forgotten."""
    file = request.files["file"]
    fd, spooled = tempfile.mkstemp(prefix="upload-")
    with open(fd, "wb") as spool:
        file.save(spool)
    target = Path(os.environ["UPLOAD_TO"]) / secure_filename(file.filename or "unnamed")
    handle = upload.put(spooled, str(target))
    return f"thank you, your upload is task {handle.id}\n", 202


if __name__ == "__main__":
    main()
