"""Builders and fakes that several test files share."""
