"""An OpenAI-compatible HTTP server for one engine. Needs the extra `serve`; importing this package alone does not."""
