# The platform: Dagster (code location, webserver, daemon), MLflow, Evidently and `cv-platform`.
# From the repository's root: docker build -f docker/platform.Dockerfile -t cv-platform/platform .
# With CUDA: --build-arg REQUIREMENTS=platform-gpu
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG REQUIREMENTS=platform
COPY docker/requirements/${REQUIREMENTS}.txt /requirements.txt
# --no-deps: the lock is complete, and leaves out opencv-python on purpose (opencv-python-headless takes its place).
# TensorFlow's C++ headers are 430 MB, and nothing here compiles against them.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-deps --require-hashes --only-binary :all: \
      --disable-pip-version-check --quiet -r /requirements.txt \
 && rm -rf /opt/venv/lib/python3*/site-packages/tensorflow/include

FROM ${PYTHON_IMAGE}
# git reads and writes the dataset repositories; the font writes class names in Chinese, Japanese and Korean into pictures.
# setpriv and the rest of Debian's base stay as they are.
RUN apt-get update \
 && apt-get install -y --no-install-recommends fonts-droid-fallback git \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 platform \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin platform \
 && install -d -o 10001 -g 10001 -m 0750 /data /data/home /data/home/metrics /data/storage /data/mlflow /data/evidently \
      /data/notebooks /data/service \
 && install -d /app /opt/dagster
COPY --from=packages /opt/venv /opt/venv
COPY docker/cv-platform /usr/local/bin/cv-platform
COPY docker/health /app/docker/health
COPY bentofile.yaml dagster.yaml workspace.yaml /app/
COPY bentos /app/bentos
COPY cv_platform /app/cv_platform
RUN /opt/venv/bin/python -m compileall -q /app/cv_platform /app/bentos
ARG REVISION=
LABEL org.opencontainers.image.title="cv-platform" org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    CV_REVISION=${REVISION} CV_HOME=/data/home CV_STORAGE=/data/storage CV_CONFIGS=/app/configs DAGSTER_HOME=/opt/dagster \
    DAGSTER_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 ORT_DISABLE_TELEMETRY=1 BENTOML_DO_NOT_TRACK=True MLFLOW_DISABLE_TELEMETRY=true \
    DISABLE_LATEST_VERSION_CHECK=True DISABLE_DEEPCHECKS_ANONYMOUS_TELEMETRY=True DVC_NO_ANALYTICS=1 \
    TF_CPP_MIN_LOG_LEVEL=2
WORKDIR /app
USER 10001:10001
CMD ["cv-platform", "--help"]
