from cv_platform_tests.unit.serving.app_fixtures import admin, client, make_worker, worker

__all__ = ["admin", "client", "make_worker", "worker"]
