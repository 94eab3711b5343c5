"""Exits with 0 when a URL answers 200: `python url.py http://127.0.0.1:5050/health`. The images have no curl."""

import sys
import urllib.request

with urllib.request.urlopen(sys.argv[1], timeout=5) as answer:
    sys.exit(0 if answer.status == 200 else 1)
