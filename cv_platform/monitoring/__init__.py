"""Monitoring: reads a window of logged requests, judges it against the reference, and tells people.

What belongs here: the window, the drift report in its forms (record, database row, HTML, Evidently) and alerts. How
drift is measured belongs to `cv_platform.drift`; when a report runs belongs to the asset graph.
"""
