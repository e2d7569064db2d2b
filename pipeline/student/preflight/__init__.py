"""The 23 checks of what is about to be trained, before the first step: docs/preflight.md lists them."""
