"""Figures: an SVG, the plotted numbers, and where they come from.

basic       waterfall, counts, estimates with intervals, curves
figures     the figures of single notebooks, one function each
provenance  written together, checked against the run
"""
