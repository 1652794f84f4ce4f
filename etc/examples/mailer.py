"""A mail queue: other programs put mails, this daemon sends them, one process each, and tries again what fails.

    daemonkit start etc/examples/mailer.py
    python -c 'import sys; sys.path.insert(0, "etc/examples"); import mailer; mailer.send_mail.put("a@b.c", "hi")'
    daemonkit queue stats

With MAILER_HOST set, mails go there (SMTP); else they are written into the log.
"""

from __future__ import annotations

import logging
import os
import smtplib
from email.message import EmailMessage

from daemonkit import current_task, main, task

log = logging.getLogger("mailer")


@task(queue="mail", max_retries=5, backoff="10s", timeout="2m", soft_timeout="1m")
def send_mail(to: str, text: str, subject: str = "A message") -> None:
    """Send one mail; what the server refuses is tried again, later and later, and then put aside with its words."""
    message = EmailMessage()
    message["From"] = os.environ.get("MAILER_FROM", "daemonkit@localhost")
    message["To"] = to
    message["Subject"] = subject
    # The same for each attempt: a server that has taken it before may know it again.
    message["Message-ID"] = f"<{current_task.queue}.{current_task.id}@daemonkit>"
    message.set_content(text)
    host = os.environ.get("MAILER_HOST")
    if host is None:
        log.info("mail to %s, attempt %d:\n%s", to, current_task.attempt, text)
        return
    with smtplib.SMTP(host, timeout=30) as server:
        server.send_message(message)


if __name__ == "__main__":
    main()
