"""The health check of the images: is this URL answered with 200, or was this file touched lately?

    python -I -S healthcheck.py http://127.0.0.1:8300/health/ready
    python -I -S healthcheck.py /tmp/heartbeat 60

Exit code 0 or 1; what is wrong goes to stdout, where ``docker inspect`` shows it. Standard library only: it runs every
few seconds beside the process that it looks after.
"""

import http.client
import os
import sys
import time
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4


def complaint_about_url(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            answer = opener.open(url, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            answer = error
        text = answer.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"{url} does not answer: {error!r}"
    return None if answer.status == 200 else f"{url} answers {answer.status}: {text}"


def complaint_about_file(path, max_age_seconds):
    try:
        age = time.time() - os.stat(path).st_mtime
    except OSError as error:
        return f"no sign of life yet: {error}"
    return None if age <= max_age_seconds else f"the last sign of life is {age:.0f} s old"


if __name__ == "__main__":
    target, *rest = sys.argv[1:]
    complaint = complaint_about_file(target, float(rest[0])) if rest else complaint_about_url(target)
    if complaint:
        print(complaint)
        sys.exit(1)
