"""JupyterLab in the stack. https://jupyter-server.readthedocs.io/en/latest/other/full-config.html."""

import os

from jupyter_server.auth import passwd

c = get_config()  # noqa: F821

c.ServerApp.ip = "0.0.0.0"
c.ServerApp.port = 8888
c.ServerApp.root_dir = "/data/notebooks"
c.ServerApp.quit_button = False
c.LabApp.open_browser = False
# nginx brings requests for whatever name people type.
c.ServerApp.allow_remote_access = True

# A password and no token. JupyterLab would send a token in the header that nginx's login needs; and one that nginx adds
# would do without the check of the origin, while browsers add nginx's login to whatever page asks for it.
c.IdentityProvider.token = ""
c.PasswordIdentityProvider.hashed_password = passwd(os.environ.pop("JUPYTER_PASSWORD"))
c.PasswordIdentityProvider.allow_password_change = False

# Between server and kernels: sockets in /tmp, no ports.
c.KernelManager.transport = "ipc"

# Nothing is asked of the world outside.
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.handlers.announcements.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
