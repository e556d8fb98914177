"""The quickstart, measured."""
