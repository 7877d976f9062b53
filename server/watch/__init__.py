"""Metrics, dashboard, recordings, and the description of the routes."""
