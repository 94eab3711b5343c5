from cv_platform_tests.support.app_fixtures import make_worker

__all__ = ["make_worker"]
