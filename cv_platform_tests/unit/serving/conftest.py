from cv_platform_tests.support.app_fixtures import admin, client, make_worker, worker

__all__ = ["admin", "client", "make_worker", "worker"]
