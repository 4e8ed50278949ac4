"""The command line: parses, calls, prints. Nothing here imports torch before a command needs it."""

from dynamize.cli.app import app, main

__all__ = ["app", "main"]
