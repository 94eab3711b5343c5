from cv_platform_tests.unit.serving.app_fixtures import make_worker, worker

__all__ = ["make_worker", "worker"]
