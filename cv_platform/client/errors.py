"""What the client raises; a subclass per decision that a caller can make. Messages are the service's own words.

ClientError                     `status_code` is the answer's; None where there was none
├── UnusableImageError          the image has to change: broken (400), too large (413), of no supported format (415)
├── RequestRefusedError         the request, its credentials or what it names have to change
└── ServiceUnavailableError     no answer that can be used, or one that says: later
"""

from __future__ import annotations


class ClientError(Exception):
    """Root of the tree.

    Attributes:
        status_code: of the service's answer; None where there was none.
    """

    def __init__(self, message: str, *, status_code: int | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code


class UnusableImageError(ClientError):
    """The image cannot be used; another one can."""


class RequestRefusedError(ClientError):
    """The service understood the request and refused it: nothing to send again as it is."""


class ServiceUnavailableError(ClientError):
    """The service cannot be reached, has no time or no model, or answers what is none of its answers."""
