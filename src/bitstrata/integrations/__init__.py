"""Bitstrata inside other people's programs; each folder imports one of them, and is imported by nobody here."""
