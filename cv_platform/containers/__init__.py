"""The stack in containers: its secrets, what is checked before it starts, and its rolling update.

`python3 -m cv_platform.containers …` runs where nothing is installed yet: standard library only, Python 3.9 on
(a test holds both). What the containers are is docker/compose.yaml's part.
"""
