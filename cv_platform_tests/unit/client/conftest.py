from cv_platform_tests.unit.serving.app_fixtures import context, make_context

__all__ = ["context", "make_context"]
