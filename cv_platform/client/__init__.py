"""The Python client of the image classifier's service: a distribution of its own that needs httpx and nothing else.

It imports nothing of the platform, which imports it: the service takes the shapes of its answers from here. The
distribution `cv-platform-client` has no `cv_platform/__init__.py`: alone its `cv_platform` is a namespace package, and
beside an installed platform, whose own is a regular package, Python takes the platform's copy of the client.
https://peps.python.org/pep-0420/#specification
"""

from cv_platform.client.client import BatchAnswer as BatchAnswer
from cv_platform.client.client import Client as Client
from cv_platform.client.client import ExplainChoice as ExplainChoice
from cv_platform.client.errors import ClientError as ClientError
from cv_platform.client.errors import RequestRefusedError as RequestRefusedError
from cv_platform.client.errors import ServiceUnavailableError as ServiceUnavailableError
from cv_platform.client.errors import UnusableImageError as UnusableImageError
