"""The command line: `bitstrata VERB`, one file a verb."""
