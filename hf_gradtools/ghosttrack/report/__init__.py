"""Dashboards and plots of tracks: HTML and SVG as text."""
