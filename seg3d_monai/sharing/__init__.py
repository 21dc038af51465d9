"""Bundles from others and for others: what they would run is listed, their format checked, archives made and opened.

Nothing that stands in a bundle is run before it has been listed; see docs/sharing.md for what is defended against.
"""
