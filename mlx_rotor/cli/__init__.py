"""Sides of commands that several share: flags, tables, units, progress."""
