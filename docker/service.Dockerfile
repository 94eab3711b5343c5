# The service: what answers /predict, and nothing that trains.
# From the repository's root: docker build -f docker/service.Dockerfile -t cv-platform/service .
# For bundles whose runtime is TensorFlow: --build-arg REQUIREMENTS=service-tensorflow
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG REQUIREMENTS=service
COPY docker/requirements/${REQUIREMENTS}.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-deps --require-hashes --only-binary :all: \
      --disable-pip-version-check --quiet -r /requirements.txt \
 && rm -rf /opt/venv/lib/python3*/site-packages/tensorflow/include

FROM ${PYTHON_IMAGE}
# The same user as the platform's: both write into central storage.
RUN groupadd --gid 10001 platform \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin platform \
 && install -d -o 10001 -g 10001 -m 0750 /data /data/service /data/storage \
 && install -d /app
COPY --from=packages /opt/venv /opt/venv
COPY docker/health /app/docker/health
COPY bentos /app/bentos
# The slice that a Bento ships: cv_platform/deployment/bento.py names it, a test compares.
COPY cv_platform/__init__.py cv_platform/audit.py cv_platform/cores.py cv_platform/errors.py cv_platform/files.py cv_platform/loopback.py \
     cv_platform/settings.py cv_platform/properties.py cv_platform/predictions.py \
     cv_platform/object_store.py cv_platform/probation.py cv_platform/storage.py /app/cv_platform/
COPY cv_platform/client /app/cv_platform/client
COPY cv_platform/config /app/cv_platform/config
COPY cv_platform/images /app/cv_platform/images
COPY cv_platform/database /app/cv_platform/database
COPY cv_platform/serving /app/cv_platform/serving
RUN /opt/venv/bin/python -m compileall -q /app/cv_platform /app/bentos
ARG REVISION=
LABEL org.opencontainers.image.title="cv-platform service" org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    CV_HOME=/data/service CV_STORAGE=/data/storage BENTOML_HOME=/tmp/bentoml \
    BENTOML_DO_NOT_TRACK=True DO_NOT_TRACK=1 ORT_DISABLE_TELEMETRY=1 TF_CPP_MIN_LOG_LEVEL=2
WORKDIR /app
USER 10001:10001
EXPOSE 4242
CMD ["python", "-m", "bentoml", "serve", "bentos.image_classifier.service:ImageClassifier", \
     "--working-dir", "/app", "--host", "0.0.0.0", "--port", "4242"]
