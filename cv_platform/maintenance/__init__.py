"""What keeps an installation alive over years: backups and their restoration, and the deletion of what is not needed.

`archive.py` and `database_dump.py` know nothing of an installation; `contents.py` says what one consists of.
"""
