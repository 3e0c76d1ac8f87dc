"""Measurements beside other programs; nothing here is part of the product."""
