# JupyterLab on the platform's image, so that notebooks import cv_platform: the profile `notebook`.
# From the repository's root, after the platform's: docker build -f docker/notebook.Dockerfile -t cv-platform/notebook .
ARG PLATFORM_IMAGE=cv-platform/platform:0.2.0

FROM ${PLATFORM_IMAGE}
USER root
COPY docker/requirements/notebook.txt /requirements.txt
# What the platform has already is pinned to the same versions, and stays as it is.
RUN --mount=type=cache,target=/root/.cache/pip \
    /usr/local/bin/python -m pip --python /opt/venv/bin/python install --no-deps --require-hashes --only-binary :all: \
      --cache-dir /root/.cache/pip --disable-pip-version-check --quiet -r /requirements.txt \
 && rm /requirements.txt \
 && install -d -o 10001 -g 10001 -m 0750 /data/notebooks
COPY docker/notebook/jupyter_server_config.py /opt/venv/etc/jupyter/
COPY docker/notebook/overrides.json /opt/venv/share/jupyter/lab/settings/
COPY docker/notebook/start.sh /app/docker/notebook/start.sh
COPY notebooks /app/notebooks
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cv-platform notebook" org.opencontainers.image.revision="${REVISION}"
# Settings, history and notebooks lie in the volume; what runs does not outlive the container.
ENV HOME=/data/notebooks JUPYTER_RUNTIME_DIR=/tmp/jupyter MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /data/notebooks
USER 10001:10001
CMD ["/app/docker/notebook/start.sh"]
