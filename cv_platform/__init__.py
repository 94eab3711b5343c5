"""cv_platform: from one YAML config to a served, logged and monitored image classifier."""
