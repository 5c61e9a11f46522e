"""Servers as their documentation shows them, to hold embedlib's against."""
