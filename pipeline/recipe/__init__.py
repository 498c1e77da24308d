"""Recipes: typed, checked, resolved, and their schema for editors."""
