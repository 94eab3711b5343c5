"""Drift: has what the model sees changed since its held-out reference, by how much, and which classes and images moved.

What belongs here: encoders, extraction of the reference rows, two-sample tests, localisation and
label-free accuracy estimates. The statistics (`sample`, `two_sample`, `verdict`, `localisation`, `order`,
`accuracy`) are pure functions of arrays; `encoders`, `extraction`, `detectors` and `reference` touch models and files.
Windows of requests, reports and alerts belong to `cv_platform.monitoring`.
"""
