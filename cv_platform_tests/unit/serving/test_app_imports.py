import subprocess
import sys


def test_importing_the_app_loads_neither_tensorflow_nor_prometheus():
    """BentoML chooses Prometheus's multi-process mode after the service is imported; TensorFlow comes with a model."""
    script = (
        "import sys, cv_platform.serving.app; "
        "print(sorted({'tensorflow', 'keras', 'prometheus_client', 'alembic', 'dagster', 'httpx'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"
