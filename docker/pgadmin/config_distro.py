"""pgAdmin in the stack. https://www.pgadmin.org/docs/pgadmin4/9.18/config_py.html.

The image's entrypoint fills /pgadmin4/config_distro.py only where it is empty; the first four values are those that it
would write.
"""

CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
LOG_FILE = "/dev/null"
HELP_PATH = "../../docs"
DEFAULT_BINARY_PATHS = {"pg": "/usr/local/pgsql-17", "pg-17": "/usr/local/pgsql-17"}

# Nothing is asked of the world outside.
UPGRADE_CHECK_ENABLED = False
SHOW_GRAVATAR_IMAGE = False
LLM_ENABLED = False
