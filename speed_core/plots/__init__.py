"""Figures: an SVG, the plotted numbers, and where they come from.

basic       waterfall, counts, estimates with intervals, curves
rows        the numbers that notebooks 01 to 06 hand to them
figures     the figures of single notebooks, one function each
provenance  written together, checked against the run
"""
