"""Changing a converted network: its parts, its layers, and which of its decisions are fixed."""
