"""Closed-form teachers, and a bed to try a method's mathematics on before any network is trained.

:mod:`.analytic` has denoisers of Gaussians and mixtures, exact for every schedule and prediction type; :mod:`.bed` has
stand-ins for student and critic, grids, batches and a training loop. ``tests/oracles`` shows them at work.
"""
