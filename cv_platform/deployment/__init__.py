"""From a trained model to production: export to one signature, immutable bundle, Bento, rollout with confirmation.

What a worker does with a bundle belongs to `cv_platform.serving`; what a model is worth to `cv_platform.evaluation`.
"""
