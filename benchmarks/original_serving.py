"""Replica of the original's request path, for comparison only; written anew from a description of what it did.

Run as `uvicorn --factory benchmarks.original_serving:application`, with a `ReplicaSettings` as JSON in the variable
`CV_BENCHMARK_ORIGINAL`. What each step of `predict` stands for in the original:

1. an `async def` route whose work all blocks, so one request at a time holds the only event loop;
2. `cv2.imdecode` to BGR and OpenCV's resize straight to the model's input, a batch of one;
3. three calls of `keras.Model.predict`: the classifier, the UAE, and the BBSD detector, which the original loaded from
   the UAE's path;
4. Grad-CAM with a `keras.Model` built anew in each request and a gradient tape, guided by the signs of both;
5. the map enlarged to the picture, weak values cut, blurred by `cv2.blur` with 5 % of the sides, coloured, overlaid;
6. three PNGs (upload, map, overlay) at the picture's size, with Pillow's `optimize`, each as base64 text;
7. a background task that makes a new SQLAlchemy engine, writes the prediction with the three texts and the log row,
   and says nothing when it fails;
8. the answer as JSON with two of the PNGs.

Not carried over: the model is loaded at start and not by a PUT; scaling is part of this model, so the pixels are not
divided by 255 here; the Keras and TensorFlow are today's. All of it is in the replica's favour or without weight.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from fastapi import BackgroundTasks, FastAPI, Request, UploadFile
from PIL import Image
from sqlalchemy import ARRAY, Column, DateTime, Float, ForeignKey, Integer, MetaData, Table, Text, create_engine, insert
from sqlalchemy.schema import CreateSchema

from benchmarks.harness import Record

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

SETTINGS_VARIABLE = "CV_BENCHMARK_ORIGINAL"
SCHEMA = "original_replica"
"""A schema of its own in the platform's database: same server, other tables."""

_metadata = MetaData(schema=SCHEMA)
predictions = Table(
    "predictions",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("model_name", Text),
    Column("input_img", Text),
    Column("raw_hm_img", Text),
    Column("overlaid_img", Text),
    Column("prediction_json", Text),
    Column("uae_feats", ARRAY(Float)),
    Column("bbsd_feats", ARRAY(Float)),
    Column("created_on", DateTime),
)
api_log = Table(
    "api_log",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("request_method", Text),
    Column("request_url", Text),
    Column("response_status_code", Integer),
    Column("response_message", Text),
    Column("timespan", Float),
    Column("prediction_id", Integer, ForeignKey(predictions.c.id)),
    Column("created_on", DateTime),
)


class ReplicaSettings(Record):
    """What the replica serves, and where it logs."""

    model_name: str
    class_names: tuple[str, ...]
    keras_path: Path
    uae_path: Path
    database_url: str


def application() -> FastAPI:
    """Builds the app: models loaded, tables made."""
    import keras

    settings = ReplicaSettings.model_validate_json(os.environ[SETTINGS_VARIABLE])
    _prepare_database(settings.database_url)
    model: Any = keras.models.load_model(settings.keras_path, compile=False)
    uae: Any = keras.models.load_model(settings.uae_path, compile=False)
    bbsd: Any = keras.models.load_model(settings.uae_path, compile=False)
    height, width = model.input_shape[1:3]
    app = FastAPI()

    @app.get("/health_check")
    def health_check() -> dict[str, str]:
        return {"message": "ready"}

    @app.post("/predict")
    async def predict(request: Request, file: UploadFile, background: BackgroundTasks) -> dict[str, Any]:
        begin = time.time()
        picture = cv2.imdecode(np.frombuffer(file.file.read(), np.uint8), cv2.IMREAD_COLOR)
        images = cv2.resize(picture, (width, height))[None]
        probabilities = model.predict(images, verbose=0)[0]
        uae_features = uae.predict(images, verbose=0)[0]
        bbsd_features = bbsd.predict(images, verbose=0)[0]
        heat = _heat_map(model, images, int(probabilities.argmax()))
        raw, overlaid = _pictures(heat, picture)
        prediction = dict(zip(settings.class_names, probabilities.tolist(), strict=True))
        texts = {name: _as_text(image) for name, image in (("overlaid_img", overlaid), ("raw_hm_img", raw))}
        row = {
            "model_name": settings.model_name,
            "input_img": _as_text(picture),
            **texts,
            "prediction_json": json.dumps(prediction),
            "uae_feats": uae_features.astype(float).tolist(),
            "bbsd_feats": bbsd_features.astype(float).tolist(),
        }
        log = {
            "request_method": request.method,
            "request_url": str(request.url),
            "response_status_code": 200,
            "response_message": "Success",
            "timespan": round(time.time() - begin, 4),
        }
        background.add_task(_write, settings.database_url, row, log)
        return {"model_name": settings.model_name, "prediction": prediction, **texts, "message": "Success"}

    return app


def _heat_map(model: keras.Model, images: np.ndarray, class_index: int) -> np.ndarray:
    """Returns guided Grad-CAM of one class as `(h, w)` uint8 at the size of the model's input."""
    import keras
    import tensorflow as tf

    last_map = next(layer for layer in reversed(model.layers) if len(layer.output.shape) == 4)
    watched = keras.Model(model.inputs, [last_map.output, model.outputs[0]])
    with tf.GradientTape() as tape:
        maps, scores = watched(tf.convert_to_tensor(images))
        score = scores[:, class_index]
    gradients = tape.gradient(score, maps)
    positive = tf.cast(maps > 0, tf.float32) * tf.cast(gradients > 0, tf.float32) * gradients
    weights = tf.reduce_mean(positive[0], axis=(0, 1))
    cam = tf.reduce_sum(maps[0] * weights, axis=-1).numpy()
    cam = cv2.resize(cam, (images.shape[2], images.shape[1]))
    span = cam.max() - cam.min()
    return (255 * (cam - cam.min()) / (span + 1e-8)).astype(np.uint8)


def _pictures(heat: np.ndarray, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coloured map and the overlay, `(H, W, 3)` uint8 BGR like `picture`."""
    enlarged = cv2.resize(heat, (picture.shape[1], picture.shape[0]))
    enlarged[enlarged < 0.05 * 255] = 0
    # Below 20 px this kernel is 0 and OpenCV raises: a defect of the original, out of reach at 320×240.
    enlarged = cv2.blur(enlarged, (int(0.05 * enlarged.shape[0]), int(0.05 * enlarged.shape[1])))
    coloured = cv2.applyColorMap(enlarged, cv2.COLORMAP_VIRIDIS)
    return coloured, cv2.addWeighted(picture, 0.2, coloured, 0.8, 0)


def _as_text(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).save(buffer, format="PNG", optimize=True)
    return base64.encodebytes(buffer.getvalue()).decode("ascii")


def _prepare_database(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(CreateSchema(SCHEMA, if_not_exists=True))
        _metadata.create_all(connection)
    engine.dispose()


def _write(url: str, row: dict[str, Any], log: dict[str, Any]) -> None:
    now = datetime.now()  # noqa: DTZ005  Local time, as the original wrote it.
    engine = create_engine(url)
    with engine.begin() as connection:
        inserted = connection.execute(insert(predictions).values(**row, created_on=now).returning(predictions.c.id))
        connection.execute(insert(api_log).values(**log, created_on=now, prediction_id=inserted.scalar_one()))
