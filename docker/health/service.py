"""Exits with 0 when this replica answers predictions, or would if a model were deployed; says why when not.

It asks no proxy, whatever the container's environment names.
"""

import json
import sys
import urllib.error
import urllib.request

try:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open("http://127.0.0.1:4242/health_check", timeout=5) as answer:
        report = json.load(answer)
except urllib.error.HTTPError as error:
    report = json.load(error)
# A new installation serves nothing yet, and is well.
waits = report["model_name"] is None and report["message"].startswith("No model is deployed yet.")
takes_entries = report["spool"]["entries"] is not None and "takes no entries" not in report["message"]
sys.stdout.write(report["message"] + "\n")
sys.exit(0 if report["status"] == "ready" or (waits and takes_entries) else 1)
