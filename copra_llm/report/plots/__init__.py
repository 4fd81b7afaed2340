"""Plots as inline SVG that takes its colours from the page, so that it is read in light and dark alike.

A panel is drawn in units of about a pixel at the width of a phone, and text is sized for that width.
"""
