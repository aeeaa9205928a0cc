"""Figures: an SVG, the plotted numbers, and where they come from.

drawing     one function a figure
provenance  written together, checked against the run
"""
